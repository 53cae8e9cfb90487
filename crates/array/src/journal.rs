//! The journal: batches of changes on their way to stable storage, one record at a time, in a ring on medium 0.

use block::{Buffer, DiskError, SegmentsMut};
use std::rc::Rc;

use crate::bytes::{Reader, Short, Writer};
use crate::catalog::Put;
use crate::format::{
    GRAIN_SECTORS, MOST_LUN_SECTORS, PAGE_BYTES, RECORD_HEADER, record_is_whole, record_length, seal_record,
};
use crate::map::HEIGHT;
use crate::media_set::MediaSet;
use crate::pages::Page;

/// One change. Doing it twice does no harm.
#[derive(Clone, Debug)]
pub enum Op {
    /// An entry of a layer's map.
    Map {
        /// The layer.
        layer: u64,
        /// The grain of the LUN.
        index: u64,
        /// The entry, [`crate::format::Entry`].
        entry: u64,
    },
    /// A new page of a layer's map.
    Node {
        /// The layer.
        layer: u64,
        /// 0 for leaves.
        level: u32,
        /// Position within the level.
        index: u64,
        /// Its pair.
        pair: u64,
    },
    /// Grains are in use from now on.
    Used {
        /// The first.
        first: u32,
        /// How many.
        count: u32,
    },
    /// Grains are free from now on.
    Free {
        /// The first.
        first: u32,
        /// How many.
        count: u32,
    },
    /// How many grains are in use after this batch.
    Usage(u64),
    /// A change of the catalog.
    Put(Put),
}

impl Op {
    fn encode(&self, out: &mut Writer) {
        match self {
            Self::Map { layer, index, entry } => out.u8(1).u64(*layer).u64(*index).u64(*entry),
            Self::Node { layer, level, index, pair } => {
                out.u8(2).u64(*layer).u32(*level).u64(*index).u64(*pair)
            }
            Self::Used { first, count } => out.u8(3).u32(*first).u32(*count),
            Self::Free { first, count } => out.u8(4).u32(*first).u32(*count),
            Self::Usage(used) => out.u8(5).u64(*used),
            Self::Put(put) => {
                put.encode(out);
                out
            }
        };
    }

    fn decode(from: &mut Reader<'_>) -> Result<Self, Short> {
        let op = Self::decode_raw(from)?;
        let bounded = match &op {
            Self::Map { index, .. } => *index < MOST_LUN_SECTORS / GRAIN_SECTORS,
            Self::Node { level, index, pair, .. } => *level < HEIGHT && *index < 1 << 31 && *pair < 1 << 35,
            Self::Used { first, count } | Self::Free { first, count } => first.checked_add(*count).is_some(),
            Self::Usage(used) => *used <= u64::from(u32::MAX),
            Self::Put(_) => true, // checked where it was decoded
        };
        if bounded { Ok(op) } else { Err(Short) }
    }

    fn decode_raw(from: &mut Reader<'_>) -> Result<Self, Short> {
        Ok(match from.u8()? {
            1 => Self::Map { layer: from.u64()?, index: from.u64()?, entry: from.u64()? },
            2 => Self::Node { layer: from.u64()?, level: from.u32()?, index: from.u64()?, pair: from.u64()? },
            3 => Self::Used { first: from.u32()?, count: from.u32()? },
            4 => Self::Free { first: from.u32()?, count: from.u32()? },
            5 => Self::Usage(from.u64()?),
            kind => Self::Put(Put::decode_kind(kind, from)?),
        })
    }
}

/// Changes that are shown in memory and not yet durable.
#[derive(Default)]
pub struct Batch {
    /// What happens, in order.
    pub ops: Vec<Op>,
    /// What the pages held before, in order: page, slot, old value.
    pub undo: Vec<(Rc<Page>, usize, u64)>,
    /// Grains that are given back when the batch is durable.
    pub freed: Vec<u32>,
    /// Entries that took a grain over from a layer below: layer, grain of the LUN.
    pub taken_over: Vec<(u64, u64)>,
}

impl Batch {
    /// Adds a change; runs of grains are joined.
    pub fn push(&mut self, op: Op) {
        match (self.ops.last_mut(), &op) {
            (Some(Op::Used { first, count }), Op::Used { first: next, count: more })
                if *first + *count == *next =>
            {
                *count += more;
            }
            (Some(Op::Free { first, count }), Op::Free { first: next, count: more })
                if *first + *count == *next =>
            {
                *count += more;
            }
            _ => self.ops.push(op),
        }
    }

    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }
}

/// The ring and where it stands.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    /// First byte on medium 0.
    pub at: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Where the next record goes.
    pub end: u64,
    /// Bytes of the ring taken since it was opened, skipped ones included. Only rises.
    pub written: u64,
    /// Of these, given back by checkpoints.
    pub freed: u64,
    /// Number of the next record.
    pub sequence: u64,
}

/// A batch did not fit into what is left of the ring.
pub struct Full;

impl Ring {
    /// Longest record in bytes.
    pub fn most(&self) -> u64 {
        self.bytes / 4
    }

    /// Bytes that the next open has to read.
    pub fn used(&self) -> u64 {
        self.written - self.freed
    }

    /// Where a record of `length` bytes goes, and how many bytes of the ring it takes with what it skips.
    fn room_for(&self, length: u64) -> Result<(u64, u64), Full> {
        let (place, takes) = if self.end + length <= self.bytes {
            (self.end, length)
        } else {
            (0, self.bytes - self.end + length)
        };
        // One page stays free, so that a full ring and an empty one differ.
        if self.used() + takes + PAGE_BYTES as u64 > self.bytes { Err(Full) } else { Ok((place, takes)) }
    }

    /// The bytes of a record, ready to be written.
    pub fn record(&self, pool: [u8; 16], ops: &[Op]) -> Buffer {
        let mut out = Writer::default();
        ops.iter().for_each(|op| op.encode(&mut out));
        let length = out.bytes.len();
        let mut record = Buffer::zeroed((RECORD_HEADER + length).next_multiple_of(PAGE_BYTES));
        record[RECORD_HEADER..RECORD_HEADER + length].copy_from_slice(&out.bytes);
        seal_record(pool, self.sequence, length, &mut record);
        record
    }

    /// Takes the place of a record of so many bytes: the byte on medium 0 where it goes.
    pub fn take(&mut self, length: u64) -> Result<u64, Full> {
        let (place, takes) = self.room_for(length)?;
        self.end = place + length;
        self.written += takes;
        self.sequence += 1;
        Ok(self.at + place)
    }

    /// Reads the next record: its operations, or `None` at the end. Moves on.
    pub async fn read(&mut self, media: &MediaSet, pool: [u8; 16]) -> Result<Option<Vec<Op>>, DiskError> {
        for place in [self.end, 0] {
            if place + PAGE_BYTES as u64 > self.bytes {
                continue;
            }
            let mut page = Buffer::zeroed(PAGE_BYTES);
            media.read(self.at + place, &SegmentsMut::new(&mut page)).await?;
            let most = self.most().min(self.bytes - place);
            let Some(length) = record_length(pool, self.sequence, &page, most) else { continue };
            let mut record = Buffer::zeroed((RECORD_HEADER + length).next_multiple_of(PAGE_BYTES));
            if place + record.len() as u64 > self.bytes {
                continue;
            }
            media.read(self.at + place, &SegmentsMut::new(&mut record)).await?;
            if !record_is_whole(&record) {
                continue;
            }
            let mut reader = Reader { rest: &record[RECORD_HEADER..RECORD_HEADER + length] };
            let mut ops = Vec::new();
            while !reader.rest.is_empty() {
                match Op::decode(&mut reader) {
                    Ok(op) => ops.push(op),
                    // The checksum was right: only a program with other operations can have written this.
                    Err(Short) => {
                        return Err(DiskError::Io(std::sync::Arc::new(std::io::Error::other(
                            "the journal holds an operation this program does not know",
                        ))));
                    }
                }
            }
            let skipped = if place == self.end { 0 } else { self.bytes - self.end };
            self.written += skipped + record.len() as u64;
            self.end = place + record.len() as u64;
            self.sequence += 1;
            return Ok(Some(ops));
        }
        Ok(None)
    }
}
