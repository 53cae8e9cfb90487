//! One segment of the index: a sorted table of chunks and their places, in pages that check themselves.

use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::chunk::{ChunkId, Location};
use crate::envelope::{self, HEAD_BYTES};
use crate::error::{Error, corrupt};
use crate::format::{
    AREA_BYTES, INDEX_MAGIC, IndexEntry, MAX_FRAME_BYTES, MAX_PACK_BYTES, PACKS_PER_PAGE, PAGE_BYTES,
    PAGE_ENTRIES, PageTail, SegmentHead,
};
use crate::store::{Store, Writing, temporary};

/// Where segments lie in the repository.
pub(crate) const INDEX: &str = "index";
/// Segments up to this length are kept in memory; of larger ones each lookup reads a few pages.
const RESIDENT_BYTES: u64 = 8 << 20;

/// Name of a segment's file, relative to the repository.
pub(crate) fn segment_name(number: u64) -> PathBuf {
    Path::new(INDEX).join(format!("{number:016x}.idx"))
}

/// The number in a segment's file name.
pub(crate) fn segment_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".idx").filter(|d| d.len() == 16)?;
    u64::from_str_radix(digits, 16).ok()
}

type Page = [u8; PAGE_BYTES];

/// A sealed, sorted table.
pub(crate) struct Segment {
    pub number: u64,
    name: PathBuf,
    file: File,
    /// Packs it covers, sorted.
    pub packs: Vec<u64>,
    /// Entries in it.
    pub entries: u64,
    first_page: u64,
    pages: u64,
    resident: Option<Vec<u8>>,
}

impl Segment {
    pub fn open(store: &Store, repository: Uuid, number: u64) -> Result<Self, Error> {
        let name = segment_name(number);
        let file = store.open(&name)?;
        let length = file.metadata().map_err(|e| Error::io("reading", &name, e))?.len();
        let mut first = [0; PAGE_BYTES];
        read_exact(&file, &name, 0, &mut first)?;
        let head = envelope::check_head(&first, &name, "index head", INDEX_MAGIC, Some(repository))?;
        let end = HEAD_BYTES + size_of::<SegmentHead>();
        let Ok(segment) = SegmentHead::read_from_bytes(&first[HEAD_BYTES..end]) else {
            return Err(corrupt(&name, "index head", HEAD_BYTES as u64, "too short", "a segment head"));
        };
        let crc = first_page_crc(&first);
        let packs_pages = segment.packs.get().div_ceil(PACKS_PER_PAGE as u64);
        let pages = segment.entries.get().div_ceil(PAGE_ENTRIES as u64);
        let expected =
            packs_pages.checked_add(pages).and_then(|p| p.checked_add(1)?.checked_mul(PAGE_BYTES as u64));
        if crc != segment.crc.get() || head.own != envelope::numbered(number) || expected != Some(length) {
            let found = format!("{length} bytes, checksum {crc:08x}");
            let wanted = format!("{expected:?} bytes, checksum {:08x}", segment.crc.get());
            return Err(corrupt(&name, "index head", HEAD_BYTES as u64, found, wanted));
        }
        let (entries, first_page) = (segment.entries.get(), 1 + packs_pages);
        let mut whole =
            Self { number, name, file, packs: Vec::new(), entries, first_page, pages, resident: None };
        whole.packs = whole.read_packs(segment.packs.get())?;
        if pages * PAGE_BYTES as u64 <= RESIDENT_BYTES {
            let mut all = Vec::with_capacity((pages as usize) * PAGE_BYTES);
            for page in 0..pages {
                all.extend_from_slice(&whole.page(page)?);
            }
            whole.resident = Some(all);
        }
        Ok(whole)
    }

    fn read_packs(&self, count: u64) -> Result<Vec<u64>, Error> {
        let mut packs = Vec::new();
        for page in 1..self.first_page {
            let (bytes, _) = self.raw_page(page)?;
            let left = (count - packs.len() as u64).min(PACKS_PER_PAGE as u64) as usize;
            packs.extend(bytes.chunks_exact(8).take(left).map(|b| {
                let mut number = [0; 8];
                number.copy_from_slice(b);
                u64::from_le_bytes(number)
            }));
        }
        Ok(packs)
    }

    /// A page by its number in the file, its checksum and address checked.
    fn raw_page(&self, page: u64) -> Result<(Page, PageTail), Error> {
        let at = page * PAGE_BYTES as u64;
        let mut bytes = [0; PAGE_BYTES];
        read_exact(&self.file, &self.name, at, &mut bytes)?;
        let (content, tail) = bytes.split_at(PAGE_BYTES - size_of::<PageTail>());
        let Ok(tail) = PageTail::read_from_bytes(tail) else {
            return Err(corrupt(&self.name, "index page", at, "too short", "a page"));
        };
        let mut plain = tail;
        plain.crc = 0.into();
        let crc = crc32c::crc32c_append(crc32c::crc32c(content), plain.as_bytes());
        if crc != tail.crc.get() || tail.page.get() != page || tail.segment.get() != self.number {
            let found = format!("page {}, checksum {crc:08x}", tail.page);
            return Err(corrupt(
                &self.name,
                "index page",
                at,
                found,
                format!("page {page}, {:08x}", tail.crc),
            ));
        }
        Ok((bytes, tail))
    }

    /// The entries' bytes of entry page `page` (0 is the first with entries).
    fn page(&self, page: u64) -> Result<Cow<'_, [u8]>, Error> {
        if let Some(all) = &self.resident {
            let at = page as usize * PAGE_BYTES;
            return Ok(Cow::Borrowed(&all[at..at + PAGE_BYTES]));
        }
        let (bytes, _) = self.raw_page(self.first_page + page)?;
        Ok(Cow::Owned(bytes.to_vec()))
    }

    /// How many entries page `page` has: all are full but the last.
    fn used(&self, page: u64) -> usize {
        (self.entries - page * PAGE_ENTRIES as u64).min(PAGE_ENTRIES as u64) as usize
    }

    fn entries_of<'a>(&self, page: u64, bytes: &'a [u8]) -> Result<&'a [IndexEntry], Error> {
        let length = self.used(page) * size_of::<IndexEntry>();
        <[IndexEntry]>::ref_from_bytes(&bytes[..length])
            .map_err(|_| corrupt(&self.name, "index page", page, "odd length", "whole entries"))
    }

    /// Finds a chunk: interpolation, since hashes are uniform, with a bisection every third step against tables
    /// that are not.
    pub fn find(&self, id: &ChunkId) -> Result<Option<(u64, Location)>, Error> {
        let (mut low, mut high) = (0, self.pages);
        let (mut low_key, mut high_key) = (0, u64::MAX);
        for step in 0u32.. {
            if low >= high {
                break;
            }
            let part = u128::from(id.prefix().saturating_sub(low_key)) * u128::from(high - low)
                / (u128::from(high_key.saturating_sub(low_key)) + 1);
            let guess =
                if step % 3 == 2 { low + (high - low) / 2 } else { (low + part as u64).min(high - 1) };
            let bytes = self.page(guess)?;
            let list = self.entries_of(guess, &bytes)?;
            let (Some(first), Some(last)) = (list.first(), list.last()) else { break };
            if id.0 < first.id {
                (high, high_key) = (guess, ChunkId(first.id).prefix());
            } else if id.0 > last.id {
                (low, low_key) = (guess + 1, ChunkId(last.id).prefix());
            } else {
                let Ok(place) = list.binary_search_by(|e| e.id.cmp(&id.0)) else { break };
                let position = guess * PAGE_ENTRIES as u64 + place as u64;
                return Ok(Some((position, self.checked(&list[place])?)));
            }
        }
        Ok(None)
    }

    fn checked(&self, entry: &IndexEntry) -> Result<Location, Error> {
        let at = Location {
            pack: entry.pack.get(),
            frame_at: entry.frame_at.get(),
            frame_stored: entry.frame_stored.get(),
            frame_raw: entry.frame_raw.get(),
            inside_at: entry.inside_at.get(),
            length: entry.length.get(),
        };
        let fits = u64::from(at.inside_at) + u64::from(at.length) <= u64::from(at.frame_raw)
            && u64::from(at.length) <= AREA_BYTES
            && at.frame_stored <= at.frame_raw
            && at.frame_raw <= MAX_FRAME_BYTES
            && u64::from(at.frame_at) + u64::from(at.frame_stored) <= MAX_PACK_BYTES;
        if fits {
            return Ok(at);
        }
        Err(corrupt(&self.name, "index entry", 0, format!("{at:?}"), "a chunk inside a frame inside a pack"))
    }

    /// Calls `each` with every entry, in order of hashes, and its position.
    pub fn each(
        &self,
        mut each: impl FnMut(u64, ChunkId, Location) -> Result<(), Error>,
    ) -> Result<(), Error> {
        for page in 0..self.pages {
            let bytes = self.page(page)?;
            for (n, entry) in self.entries_of(page, &bytes)?.iter().enumerate() {
                each(page * PAGE_ENTRIES as u64 + n as u64, ChunkId(entry.id), self.checked(entry)?)?;
            }
        }
        Ok(())
    }

    /// Entries of one page, for merging: bounded memory. `None` after the last.
    pub fn page_entries(&self, page: u64) -> Result<Option<Vec<(ChunkId, Location)>>, Error> {
        if page >= self.pages {
            return Ok(None);
        }
        let bytes = self.page(page)?;
        let list = self.entries_of(page, &bytes)?;
        list.iter().map(|e| Ok((ChunkId(e.id), self.checked(e)?))).collect::<Result<_, _>>().map(Some)
    }
}

fn read_exact(file: &File, name: &Path, at: u64, into: &mut [u8]) -> Result<(), Error> {
    file.read_exact_at(into, at).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => corrupt(name, "index length", at, "end of file", "a page"),
        _ => Error::io("reading", name, e),
    })
}

/// CRC32C of the whole first page with the segment head's checksum field zero.
fn first_page_crc(page: &Page) -> u32 {
    let at = HEAD_BYTES + std::mem::offset_of!(SegmentHead, crc);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&page[..at]), &[0; 4]);
    crc32c::crc32c_append(crc, &page[at + 4..])
}

/// Writes a segment front to back from entries in order.
pub(crate) struct SegmentWriter {
    number: u64,
    repository: Uuid,
    writing: Writing,
    packs: u64,
    page: u64,
    entries: u64,
    open: Vec<u8>,
    last: Option<ChunkId>,
}

impl SegmentWriter {
    /// Begins a segment that covers `packs` (sorted here).
    pub fn create(store: &Store, repository: Uuid, mut packs: Vec<u64>) -> Result<Self, Error> {
        packs.sort_unstable();
        packs.dedup();
        let number = crate::pack::new_number();
        let mut writing = store.create(&temporary(&segment_name(number)))?;
        writing.append(&[0; PAGE_BYTES])?;
        let (count, open) = (packs.len() as u64, Vec::with_capacity(PAGE_BYTES));
        let mut this =
            Self { number, repository, writing, packs: count, page: 1, entries: 0, open, last: None };
        for list in packs.chunks(PACKS_PER_PAGE) {
            list.iter().for_each(|pack| this.open.extend_from_slice(&pack.to_le_bytes()));
            this.close_page(list.len())?;
        }
        Ok(this)
    }

    fn close_page(&mut self, used: usize) -> Result<(), Error> {
        self.open.resize(PAGE_BYTES - size_of::<PageTail>(), 0);
        let mut tail = PageTail::new_zeroed();
        (tail.segment, tail.page, tail.used) = (self.number.into(), self.page.into(), (used as u32).into());
        tail.crc = crc32c::crc32c_append(crc32c::crc32c(&self.open), tail.as_bytes()).into();
        self.open.extend_from_slice(tail.as_bytes());
        self.writing.append(&self.open)?;
        self.open.clear();
        self.page += 1;
        Ok(())
    }

    /// Adds an entry; hashes come in rising order.
    pub fn add(&mut self, id: ChunkId, at: &Location) -> Result<(), Error> {
        assert!(self.last.is_none_or(|last| last < id), "entries of a segment are sorted and unique");
        self.last = Some(id);
        let entry = IndexEntry {
            id: id.0,
            pack: at.pack.into(),
            frame_at: at.frame_at.into(),
            frame_stored: at.frame_stored.into(),
            frame_raw: at.frame_raw.into(),
            inside_at: at.inside_at.into(),
            length: at.length.into(),
            spare: 0.into(),
        };
        self.open.extend_from_slice(entry.as_bytes());
        self.entries += 1;
        if self.open.len() == PAGE_ENTRIES * size_of::<IndexEntry>() {
            self.close_page(PAGE_ENTRIES)
        } else {
            Ok(())
        }
    }

    /// Makes it durable and gives its number.
    pub fn finish(mut self) -> Result<u64, Error> {
        if !self.open.is_empty() {
            self.close_page(self.open.len() / size_of::<IndexEntry>())?;
        }
        let mut page = [0; PAGE_BYTES];
        let head = envelope::head_bytes(INDEX_MAGIC, self.repository, envelope::numbered(self.number));
        page[..HEAD_BYTES].copy_from_slice(&head);
        let mut segment = SegmentHead::new_zeroed();
        (segment.packs, segment.entries) = (self.packs.into(), self.entries.into());
        let end = HEAD_BYTES + size_of::<SegmentHead>();
        page[HEAD_BYTES..end].copy_from_slice(segment.as_bytes());
        segment.crc = first_page_crc(&page).into();
        page[HEAD_BYTES..end].copy_from_slice(segment.as_bytes());
        self.writing.rewrite_start(&page)?;
        self.writing.publish(&segment_name(self.number))?;
        Ok(self.number)
    }
}
