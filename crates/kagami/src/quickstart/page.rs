//! What the quickstart says: a line per step while it works, and the closing page.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::output::Output;
use crate::units::{show_count, show_duration, show_rate, show_size};

/// Steps with their times, on stderr while they run.
pub struct Steps {
    live: bool,
    begun: Instant,
    step: Option<(String, Instant)>,
    number: usize,
    total: usize,
}

impl Steps {
    /// `total` steps will come.
    pub fn new(out: &Output, total: usize) -> Self {
        Self { live: !out.quiet, begun: Instant::now(), step: None, number: 0, total }
    }

    /// The next step begins; the one before is done.
    pub fn next(&mut self, what: &str) {
        self.done("");
        self.number += 1;
        self.step = Some((what.to_owned(), Instant::now()));
        if self.live {
            eprint!("[{:2}/{}] {what:58} ", self.number, self.total);
        }
    }

    /// The step is done, with a remark.
    pub fn done(&mut self, remark: &str) {
        if let Some((_, begun)) = self.step.take()
            && self.live
        {
            eprintln!("{:>9}  {remark}", show_duration(begun.elapsed()));
        }
    }

    /// Time since the beginning.
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }
}

/// One backup on the page.
#[derive(Clone, Debug, Default)]
pub struct BackupLine {
    /// Identity.
    pub id: String,
    /// `redo` or `snapshot`.
    pub via: String,
    /// `full` or `incremental`.
    pub kind: String,
    /// `crash`, `filesystem`, `application`.
    pub label: String,
    /// Size of all disks.
    pub size_bytes: u64,
    /// Bytes read from the disks.
    pub read_bytes: u64,
    /// Bytes that the repository grew by.
    pub stored_bytes: u64,
    /// How long writes were held back at the cut.
    pub hold: Duration,
    /// From the job's beginning to its end.
    pub time: Duration,
    /// When it was cut, in microseconds since 1970.
    pub cut_at_us: i64,
    /// Writes acknowledged between the cut and the end of the copy.
    pub writes_meanwhile: u64,
}

/// One disk's proof.
#[derive(Clone, Debug)]
pub struct ProofLine {
    /// `C:` or `D:`.
    pub drive: String,
    /// Bytes compared.
    pub bytes: u64,
    /// BLAKE3 of both sides.
    pub hash: String,
}

/// A backup, restored and compared.
#[derive(Clone, Debug)]
pub struct Proved {
    /// The backup.
    pub backup: BackupLine,
    /// The VM that it was restored as.
    pub vm: String,
    /// Bytes that the restore wrote.
    pub restored_bytes: u64,
    /// Time of the restore.
    pub restore_time: Duration,
    /// The comparison, disk by disk.
    pub disks: Vec<ProofLine>,
    /// The newest write that the restored VM holds.
    pub prefix: u64,
}

/// Everything that the page says.
pub struct Page<'a> {
    /// Directory of the quickstart.
    pub dir: &'a Path,
    /// The daemon's home in it.
    pub home: &'a Path,
    /// The repository in it.
    pub repo: &'a Path,
    /// Size of C:.
    pub c_bytes: u64,
    /// Size of D:.
    pub d_bytes: u64,
    /// D:'s LUN identity.
    pub naa: &'a str,
    /// The backups, in order, each proved.
    pub proved: &'a [Proved],
    /// Writes that the writer made in all.
    pub writes: u64,
    /// Time of everything.
    pub total: Duration,
    /// How this program was called, for the lines to type.
    pub program: &'a str,
}

impl Page<'_> {
    /// The page.
    pub fn render(&self) -> String {
        let mut out = String::new();
        self.picture(&mut out);
        for (index, proved) in self.proved.iter().enumerate() {
            backup_lines(&mut out, index + 1, &proved.backup);
            proof_lines(&mut out, proved);
        }
        let _ = writeln!(
            out,
            "  in all     {} writes, each acknowledged before the next; everything took {}",
            show_count(self.writes),
            show_duration(self.total)
        );
        self.next(&mut out);
        out
    }

    fn picture(&self, out: &mut String) {
        let (c, d) = (show_size(self.c_bytes), show_size(self.d_bytes));
        let vms: Vec<&str> = self.proved.iter().map(|p| p.vm.as_str()).collect();
        let _ = write!(
            out,
            "
  VM         sql01, and a writer in a process of its own, over NBD, all the while
               |                                    |
  disk       C: {c:<10} scsi0:0                D: {d:<10} scsi0:1
             sql01.vmdk, flat, thin               sql01_1.vmdk
               |                                    |
  mapping      |                                  sql01_1-rdmp.vmdk, raw, physical
               |                                    |   points by identity:
  LUN        ds1 (VMFS-5 datastore \"ds1\")         sql01-d  {naa}
               |                                    |
  snapshot   redo log (1) or snapshot (2)         snapshot (1 and 2)
               +----- one cut, one instant ---------+
               |
  backup     {repo}
               |
  restored   {vms}: new identities, new LUNs

",
            naa = self.naa,
            repo = self.repo.display(),
            vms = vms.join(", "),
        );
    }

    fn next(&self, out: &mut String) {
        let me = self.program;
        let [dir, home, repo] = [self.dir, self.home, self.repo].map(typed);
        let _ = write!(
            out,
            "
  What to type next (the daemon keeps running):
    export KAGAMI_HOME={home}
    {me} vm show sql01                       # the VM and its disks
    {me} rdm show ds1:sql01/sql01_1.vmdk     # a mapping: its identity in three places
    {me} backup create sql01 --repo {repo}
    {me} backup ls --repo {repo}
    {me} backup verify --repo {repo}
    {me} snap create sql01-d@before-upgrade  # a snapshot, in constant time
    {me} export ls                           # what is served, as nbd+unix:// addresses
    {me} --help
  Remove everything again:
    {me} quickstart --dir {dir} --remove
",
        );
    }
}

/// A path as it is typed in a shell.
pub fn typed(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+,=@%".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

fn backup_lines(out: &mut String, number: usize, b: &BackupLine) {
    let _ = write!(
        out,
        "  backup {number}   {id}  {kind}, via {via}, label {label}\n             \
         {size} of disks, {read} read ({rate}), {stored} stored, in {time}\n             \
         writes were held {hold} at the cut; {writes} writes were acknowledged while it copied\n",
        id = b.id,
        kind = b.kind,
        via = b.via,
        label = b.label,
        size = show_size(b.size_bytes),
        read = show_size(b.read_bytes),
        rate = show_rate(b.read_bytes, b.time),
        stored = show_size(b.stored_bytes),
        time = show_duration(b.time),
        hold = show_duration(b.hold),
        writes = show_count(b.writes_meanwhile),
    );
}

fn proof_lines(out: &mut String, proved: &Proved) {
    let Proved { vm, restored_bytes, restore_time, disks, prefix, .. } = proved;
    let _ = writeln!(
        out,
        "  restored   as {vm}: {} written in {}",
        show_size(*restored_bytes),
        show_duration(*restore_time)
    );
    for line in disks {
        let _ = writeln!(
            out,
            "  proof      {} {} read over NBD from {vm} and from the frozen image: equal\n             blake3 {}",
            line.drive,
            show_size(line.bytes),
            line.hash
        );
    }
    let _ = writeln!(
        out,
        "  proof      C: and D: hold writes 1 to {}, made in turn, all of them and no later one: one instant\n",
        show_count(*prefix)
    );
}
