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
    /// The backups, in order.
    pub backups: &'a [BackupLine],
    /// The proof, disk by disk.
    pub proof: &'a [ProofLine],
    /// The newest write that the restored VM holds.
    pub prefix: u64,
    /// Writes that the writer made in all.
    pub writes: u64,
    /// Time of the restore.
    pub restore_time: Duration,
    /// Bytes that the restore wrote.
    pub restored_bytes: u64,
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
        self.table(&mut out);
        self.proof_lines(&mut out);
        self.next(&mut out);
        out
    }

    fn picture(&self, out: &mut String) {
        let (c, d) = (show_size(self.c_bytes), show_size(self.d_bytes));
        let _ = write!(
            out,
            "
  VM sql01 --- a writer of its own process, over NBD, all the while
   |
   +-- C:  scsi0:0  sql01.vmdk ---------- flat, thin, on VMFS-5 datastore \"ds1\" ---+
   |       {c:10}                                                           |
   +-- D:  scsi0:1  sql01_1.vmdk ---+                                           |
           {d:10}               | raw device mapping (physical)             |
                                    v                                           v
                              LUN sql01-d                                 LUN ds1
                              {naa}        (VMFS below, array above)
                                    |                                           |
                                    +----------- one cut, one instant ----------+
                                                        |
                              backup  {repo}
                                                        |
                              restored as VM sql01-copy, new identities, new LUN

",
            naa = self.naa,
            repo = self.repo.display(),
        );
    }

    fn table(&self, out: &mut String) {
        for (index, b) in self.backups.iter().enumerate() {
            let rate = show_rate(b.read_bytes, b.time);
            let _ = write!(
                out,
                "  backup {n}   {id}  {kind}, via {via}, label {label}\n             \
                 {size} of disks, {read} read ({rate}), {stored} stored, in {time}\n             \
                 writes were held {hold} at the cut; {writes} writes were acknowledged while it copied\n",
                n = index + 1,
                id = b.id,
                kind = b.kind,
                via = b.via,
                label = b.label,
                size = show_size(b.size_bytes),
                read = show_size(b.read_bytes),
                stored = show_size(b.stored_bytes),
                time = show_duration(b.time),
                hold = show_duration(b.hold),
                writes = show_count(b.writes_meanwhile),
            );
        }
        let _ = writeln!(
            out,
            "  restore    as sql01-copy: {} written in {}",
            show_size(self.restored_bytes),
            show_duration(self.restore_time)
        );
    }

    fn proof_lines(&self, out: &mut String) {
        for line in self.proof {
            let _ = writeln!(
                out,
                "  proof      {} {} read over NBD from the restored VM and from the frozen image: equal\n             \
                 blake3 {}",
                line.drive,
                show_size(line.bytes),
                line.hash
            );
        }
        let _ = writeln!(
            out,
            "  proof      C: and D: hold writes no. 1 to {}, written in turn, all of them and no later one:\n             \
             one instant. (The writer made {} in all.)",
            show_count(self.prefix),
            show_count(self.writes)
        );
        let _ = writeln!(out, "  time       {} in all", show_duration(self.total));
    }

    fn next(&self, out: &mut String) {
        let (me, home, repo) = (self.program, self.home.display(), self.repo.display());
        let _ = write!(
            out,
            "
  What to type next (the daemon keeps running):
    export KAGAMI_HOME={home}
    {me} vm show sql01                             the VM and its disks
    {me} rdm show ds1:sql01/sql01_1.vmdk           a mapping: its identity in three places
    {me} backup create sql01 --repo {repo}
    {me} backup ls --repo {repo}
    {me} backup verify --repo {repo}
    {me} snap create sql01-d@before-upgrade        a snapshot, in constant time
    {me} export ls                                 what is served, as nbd+unix:// addresses
    {me} --help
  Remove everything again:
    {me} quickstart --dir {dir} --remove
",
            dir = self.dir.display(),
        );
    }
}
