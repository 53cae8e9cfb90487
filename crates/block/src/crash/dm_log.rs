//! The dm-log-writes layout (Linux `Documentation/admin-guide/device-mapper/log-writes.rst`), so that a failing run
//! can be replayed by others' tools: what a [`CrashLog`] keeps where `KAGAMI_DMLOG` names a directory.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{CrashLog, Inner, Operation, Recorded, What};
use crate::{BLOCK_BYTES, SECTOR_BYTES, Safe, SegmentsMut};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
/// An entry's fields: sector, sectors, flags, length of a mark.
const FIELDS: usize = 32;
/// Longest text of a mark: it lies in the entry's own sector, with a zero at its end.
const MOST_MARK: usize = SECTOR_BYTES as usize - FIELDS - 1;
/// The environment variable that names a directory for the logs of failing tests.
const DIRECTORY: &str = "KAGAMI_DMLOG";
/// The mark where power was cut.
const CUT: &str = "power fails";

fn sector(parts: &[&[u8]]) -> Vec<u8> {
    let mut out = parts.concat();
    out.resize(out.len().next_multiple_of(SECTOR_BYTES as usize), 0);
    out
}

fn entry(at: u64, count: u64, flags: u64, data: &[u8]) -> Vec<u8> {
    let mut out = sector(&[&[at, count, flags, 0].map(u64::to_le_bytes).concat()]);
    out.extend_from_slice(data);
    out
}

fn mark(text: &str) -> Vec<u8> {
    let mut end = text.len().min(MOST_MARK);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let fields = [0, 0, MARK, end as u64].map(u64::to_le_bytes).concat();
    sector(&[&fields, &text.as_bytes()[..end]])
}

/// Where an operation stands in the log, and its entry. A write stands where it ended: only then it is there for a
/// flush that begins. A flush stands where it began, as it promises nothing that ended later. What did not end is left
/// out.
fn logged(operation: &Operation) -> Option<(usize, Vec<u8>)> {
    let end = operation.end.get()?;
    Some(match &operation.what {
        What::Write { at, data, safe } => {
            let flags = if *safe == Safe::OnReturn { FUA } else { 0 };
            (end, entry(at.0, data.len() as u64 / SECTOR_BYTES, flags, data))
        }
        What::Zero { at, count, unmap: true } => (end, entry(at.0, *count, DISCARD, &[])),
        What::Zero { at, count, unmap: false } => {
            (end, entry(at.0, *count, 0, &vec![0; (*count * SECTOR_BYTES) as usize]))
        }
        What::Flush => (operation.begin, entry(0, 0, FLUSH, &[])),
    })
}

/// Writes the log of disk number `disk` as dm-log-writes does: a superblock, then one entry per operation, with the
/// marks between them. What had not ended is left out.
pub fn write_dm_log(log: &CrashLog, disk: usize, out: &mut impl Write) -> io::Result<()> {
    write_log(&log.inner.disks.borrow()[disk], &log.marks(), out)
}

fn write_log(disk: &Recorded, marks: &[(usize, String)], out: &mut impl Write) -> io::Result<()> {
    let mut entries: Vec<(usize, Vec<u8>)> = disk.operations.borrow().iter().filter_map(logged).collect();
    // A mark that was added for a point comes before what happened there.
    entries.splice(0..0, marks.iter().map(|(when, text)| (*when, mark(text))));
    entries.sort_by_key(|(when, _)| *when);
    let head = [MAGIC, 1, entries.len() as u64].map(u64::to_le_bytes).concat();
    out.write_all(&sector(&[&head, &(SECTOR_BYTES as u32).to_le_bytes()]))?;
    entries.iter().try_for_each(|(_, bytes)| out.write_all(bytes))
}

impl CrashLog {
    /// Keeps the logs of all disks and what they held before the first entry, for whoever looks into a failure at a
    /// point: in the directory that `KAGAMI_DMLOG` names, and nowhere without it. Replayed up to the mark
    /// `power fails`, a log shows everything that had returned by then.
    pub fn keep(&self, name: &str, point: Option<usize>) {
        self.inner.keep(name, point);
    }
}

impl Inner {
    fn keep(&self, name: &str, point: Option<usize>) {
        let Some(directory) = std::env::var_os(DIRECTORY) else { return };
        match self.keep_in(Path::new(&directory), name, point) {
            Ok(files) => files.iter().for_each(|f| eprintln!("kept: {}", f.display())),
            Err(error) => eprintln!("{DIRECTORY}: the log of {name} is not kept: {error}"),
        }
    }

    /// A test ends with a panic while it has the log: perhaps the log says why.
    pub(super) fn keep_if_panicking(&self) {
        if std::thread::panicking() {
            let thread = std::thread::current();
            let name = thread.name().unwrap_or("test").replace("::", ".");
            self.keep(&format!("{name}-{}-{}", std::process::id(), self.clock.get()), None);
        }
    }

    fn keep_in(&self, directory: &Path, name: &str, point: Option<usize>) -> io::Result<Vec<PathBuf>> {
        std::fs::create_dir_all(directory)?;
        let mut marks = self.marks.borrow().clone();
        marks.extend(point.map(|point| (point, CUT.to_owned())));
        let mut files = Vec::new();
        for (number, disk) in self.disks.borrow().iter().enumerate() {
            let file = |end: &str| directory.join(format!("{name}-disk{number}.{end}"));
            let mut log = io::BufWriter::new(std::fs::File::create(file("dmlog"))?);
            write_log(disk, &marks, &mut log)?;
            log.flush()?;
            write_first(disk, &file("first"))?;
            files.extend([file("dmlog"), file("first")]);
        }
        Ok(files)
    }
}

/// What the disk held before the first entry, as a sparse file.
fn write_first(disk: &Recorded, path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path)?;
    file.set_len(disk.first.sectors * SECTOR_BYTES)?;
    let (mut next, mut bytes) = (0, [0; BLOCK_BYTES as usize]);
    while let Some(page) = disk.first.pages.next_page(next) {
        disk.first.pages.read(page * BLOCK_BYTES, &SegmentsMut::new(&mut bytes));
        file.write_all_at(&bytes, page * BLOCK_BYTES)?;
        next = page + 1;
    }
    // The last page may be longer than the disk.
    file.set_len(disk.first.sectors * SECTOR_BYTES)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;
    use crate::crash::Witness;
    use crate::{Disk, Image, MemoryDisk, Pages, Sector, Segments};

    /// A reader of its own: what the kernel's documentation says, and nothing of what is above.
    mod reader {
        #[derive(PartialEq, Debug)]
        pub(super) enum Entry {
            Write { at: usize, data: Vec<u8>, fua: bool },
            Discard { at: usize, count: usize },
            Flush,
            Mark(String),
        }

        fn word(bytes: &[u8], number: usize) -> u64 {
            u64::from_le_bytes(bytes[number * 8..number * 8 + 8].try_into().unwrap())
        }

        pub(super) fn entries(log: &[u8]) -> Vec<Entry> {
            assert_eq!((word(log, 0), word(log, 1)), (0x6a736677736872, 1), "magic and version");
            assert_eq!(u32::from_le_bytes(log[24..28].try_into().unwrap()), 512, "bytes of a sector");
            let (mut at, mut out) = (512, Vec::new());
            for _ in 0..word(log, 2) {
                let head = &log[at..at + 512];
                let [sector, count, flags, length] = [0, 1, 2, 3].map(|n| word(head, n) as usize);
                at += 512;
                if flags & 8 != 0 {
                    assert!(length < 512 - 32, "a mark lies in its sector, with a zero behind it");
                    out.push(Entry::Mark(String::from_utf8(head[32..32 + length].to_vec()).unwrap()));
                    continue;
                }
                assert_eq!(length, 0, "only marks have a length");
                match flags & !2 {
                    4 => out.push(Entry::Discard { at: sector, count }),
                    1 => out.push(Entry::Flush),
                    _ => {
                        let data = log[at..at + count * 512].to_vec();
                        at += data.len();
                        out.push(Entry::Write { at: sector, data, fua: flags & 2 != 0 });
                    }
                }
            }
            assert_eq!(at, log.len(), "nothing behind the last entry");
            out
        }

        /// Applies entries to an image, up to a mark.
        pub(super) fn replay(image: &mut [u8], entries: &[Entry], upto: Option<&str>) {
            for entry in entries {
                match entry {
                    Entry::Mark(text) if Some(text.as_str()) == upto => return,
                    Entry::Mark(_) | Entry::Flush => {}
                    Entry::Write { at, data, .. } => {
                        image[at * 512..at * 512 + data.len()].copy_from_slice(data)
                    }
                    Entry::Discard { at, count } => image[at * 512..(at + count) * 512].fill(0),
                }
            }
            assert!(upto.is_none(), "no mark {upto:?}");
        }
    }

    use reader::{Entry, entries, replay};

    fn written(log: &CrashLog, disk: usize) -> Vec<Entry> {
        let mut out = Vec::new();
        write_dm_log(log, disk, &mut out).unwrap();
        entries(&out)
    }

    #[test]
    fn the_log_has_the_kernel_layout() {
        let log = CrashLog::new(0);
        let disk = log.disk(64);
        lane::block_on(async {
            disk.write(Sector(5), &Segments::new(&[9; 1024]), Safe::OnReturn).await.unwrap();
            log.mark("here");
            disk.unmap(Sector(8), 2).await.unwrap();
            disk.flush().await.unwrap();
        });
        let mut out = Vec::new();
        write_dm_log(&log, 0, &mut out).unwrap();
        let word = |at: usize| u64::from_le_bytes(out[at..at + 8].try_into().unwrap());
        assert_eq!((word(0), word(8), word(16), word(24)), (MAGIC, 1, 4, 512));
        assert_eq!([word(512), word(520), word(528), word(536)], [5, 2, FUA, 0]);
        assert_eq!(out[1024..2048], [9; 1024]);
        assert_eq!((word(2064), word(2072), &out[2080..2084]), (MARK, 4, &b"here"[..]));
        assert_eq!([word(2560), word(2568), word(2576), word(2584)], [8, 2, DISCARD, 0]);
        assert_eq!(word(3088), FLUSH);
        assert_eq!(out.len(), 3584);
    }

    #[test]
    fn a_mark_that_is_too_long_is_cut_at_a_letter() {
        let log = CrashLog::new(0);
        log.disk(8);
        let long = "x".repeat(MOST_MARK - 1);
        for text in ["", "short", &long, &format!("{long}yz"), &format!("{long}\u{e9}{long}")] {
            log.mark(text);
        }
        let marks = ["", "short", &long, &format!("{long}y"), &long].map(|m| Entry::Mark(m.to_owned()));
        assert_eq!(written(&log, 0), marks);
    }

    /// What ends after a flush began is not promised by it: it comes later in the log.
    #[test]
    fn a_flush_stands_where_it_began() {
        let log = CrashLog::new(0);
        log.disk(8);
        {
            let disks = log.inner.disks.borrow();
            let mut operations = disks[0].operations.borrow_mut();
            let mut push = |what: What, begin: usize, end: Option<usize>| {
                operations.push(Operation { what, begin, end: Cell::new(end), early: false });
            };
            let write = |at: u64| What::Write {
                at: Sector(at),
                data: vec![at as u8; 512].into(),
                safe: Safe::AtNextFlush,
            };
            push(write(0), 0, Some(3));
            push(write(1), 1, Some(6));
            push(What::Flush, 4, Some(9));
            push(write(2), 5, Some(7));
            push(write(3), 8, None);
            push(What::Flush, 10, None);
        }
        let write = |at: usize| Entry::Write { at, data: vec![at as u8; 512], fua: false };
        assert_eq!(written(&log, 0), [write(0), Entry::Flush, write(1), write(2)]);
    }

    /// Two writers whose operations overlap, a third who flushes; a mark now and then.
    async fn workload(log: &CrashLog, seed: u64, first: Image) -> Rc<Witness> {
        log.interleave(4);
        let disk = log.disk_from(first.clone());
        let witness = Witness::over(log, disk, first);
        let writer = |number: u64| {
            let (witness, log) = (Rc::clone(&witness), log.clone());
            lane::spawn(async move {
                let mut random = fastrand::Rng::with_seed(seed * 2 + number);
                for step in 0..40u8 {
                    let at = Sector(random.u64(0..60));
                    let bytes = vec![step * 2 + number as u8 + 1; 512 * random.usize(1..=4)];
                    let safe = if random.u8(0..6) == 0 { Safe::OnReturn } else { Safe::AtNextFlush };
                    match random.u8(0..8) {
                        0 => witness.unmap(at, 3).await.unwrap(),
                        1 => witness.zero(at, 2, true).await.unwrap(),
                        2 => log.mark(format!("mark {number}.{step}")),
                        3 => witness.flush().await.unwrap(),
                        _ => witness.write(at, &Segments::new(&bytes), safe).await.unwrap(),
                    }
                }
            })
        };
        let writers = [writer(0), writer(1)];
        for writer in writers {
            writer.await;
        }
        witness
    }

    fn first_image() -> Image {
        let mut pages = Pages::default();
        pages.write(0, &Segments::new(&[0xf1; 64 * 512]));
        Image { sectors: 64, pages }
    }

    /// Replayed up to any mark, the log shows what a disk may hold that lost power there; to its end, what is there.
    #[test]
    fn crash_logs_are_replayed_by_another_reader() {
        for seed in 0..60 {
            lane::block_on(async {
                let log = CrashLog::new(seed);
                let witness = workload(&log, seed, first_image()).await;
                let list = written(&log, 0);
                let marks = log.marks();
                assert!(!marks.is_empty() && list.contains(&Entry::Flush));
                for (point, text) in marks {
                    let mut image = vec![0xf1; 64 * 512];
                    replay(&mut image, &list, Some(&text));
                    let disk = MemoryDisk::new(64);
                    disk.write(Sector(0), &Segments::new(&image), Safe::OnReturn).await.unwrap();
                    let judged = witness.judge(point, &disk).await;
                    judged.unwrap_or_else(|v| panic!("seed {seed}, {text}: {v:?}"));
                }
                let mut image = vec![0xf1; 64 * 512];
                replay(&mut image, &list, None);
                let disk = MemoryDisk::new(64);
                disk.write(Sector(0), &Segments::new(&image), Safe::OnReturn).await.unwrap();
                witness.judge(log.points(), &disk).await.unwrap();
            });
        }
    }

    /// What a failing test leaves: the log of each disk with the mark where power was cut, and the image it begins with.
    #[test]
    fn crash_logs_are_kept_with_their_first_image() {
        let directory = std::env::temp_dir().join(format!("block-dmlog-{}", std::process::id()));
        lane::block_on(async {
            let log = CrashLog::new(7);
            let witness = workload(&log, 7, first_image()).await;
            log.disk(16);
            let point = log.points() / 2;
            let files = log.inner.keep_in(&directory, "story", Some(point)).unwrap();
            let names: Vec<_> = files.iter().map(|f| f.file_name().unwrap().to_str().unwrap()).collect();
            let wanted = ["story-disk0.dmlog", "story-disk0.first", "story-disk1.dmlog", "story-disk1.first"];
            assert_eq!(names, wanted);
            let mut image = std::fs::read(&files[1]).unwrap();
            assert_eq!(image, [0xf1; 64 * 512]);
            replay(&mut image, &entries(&std::fs::read(&files[0]).unwrap()), Some(CUT));
            let disk = MemoryDisk::new(64);
            disk.write(Sector(0), &Segments::new(&image), Safe::OnReturn).await.unwrap();
            witness.judge(point, &disk).await.unwrap();
            assert_eq!(std::fs::read(&files[3]).unwrap(), [0; 16 * 512]);
        });
        std::fs::remove_dir_all(directory).unwrap();
    }

    /// A test that panics leaves its logs by itself, where the environment says so.
    #[test]
    fn crash_logs_of_a_test_that_panics_are_kept() {
        const TEST: &str = "crash::dm_log::tests::crash_logs_of_a_test_that_panics_are_kept";
        if std::env::var_os("BLOCK_TEST_PANIC").is_some() {
            let log = CrashLog::new(1);
            let disk = log.disk(16);
            lane::block_on(async {
                disk.write(Sector(3), &Segments::new(&[5; 512]), Safe::OnReturn).await.unwrap();
                panic!("as planned");
            });
            return;
        }
        let directory = std::env::temp_dir().join(format!("block-dmlog-panic-{}", std::process::id()));
        let run = |keep: bool| {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", TEST, "--nocapture"]).env("BLOCK_TEST_PANIC", "1").env_remove(DIRECTORY);
            if keep {
                child.env(DIRECTORY, &directory);
            }
            assert!(!child.output().unwrap().status.success());
        };
        run(false);
        assert!(!directory.exists(), "nobody asked for it");
        run(true);
        let files: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|f| f.unwrap().path()).collect();
        let log = files.iter().find(|f| f.extension().is_some_and(|e| e == "dmlog")).unwrap();
        let list = entries(&std::fs::read(log).unwrap());
        assert_eq!(list, [Entry::Write { at: 3, data: vec![5; 512], fua: true }]);
        std::fs::remove_dir_all(directory).unwrap();
    }
}
