//! J, the job record of one vmsnap: a preallocated file on the datastore, written in place, one sector at a time.
//!
//! It is what recovery reads first (semantics chapters 7 and 10). The layout, in sectors of 512 bytes:
//!
//! ```text
//! 0, 1   state slots, written in turn; the one with the higher sequence and a right checksum counts
//! 2..8   spare
//! 8..    payload: what the job is about, as JSON; written before the first state and again never
//! ```
//!
//! A state is one sector, so it is there whole or not at all; the payload is flushed before a state names its
//! checksum. Nothing is allocated when a state changes, so it may be written while write gates are closed.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use block::{Disk, DiskError, SECTOR_BYTES, Safe, Sector, Segments, SegmentsMut};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Length of the file that holds a job record, in bytes.
pub const JOB_BYTES: u64 = 256 << 10;
/// Format written and the newest one understood.
pub const JOB_VERSION: u32 = 1;

/// Most disks of one job: one bit of [`State::flipped`] each, and a VM has 60 SCSI and 4 IDE slots (chapter 6).
const MOST_DISKS: usize = 64;

const MAGIC: [u8; 8] = *b"KGMJOB\0\0";
const PAYLOAD_AT: Sector = Sector(8);
const PAYLOAD_MOST: usize = (JOB_BYTES - 8 * SECTOR_BYTES) as usize;

/// Where a vmsnap stands (chapter 7, column "J").
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Step {
    /// The redo logs are about to be made, or are made and not referenced.
    Intent,
    /// Ready to switch; whether it happened is decided by the record named in [`State::decided_by`].
    Prepared,
    /// Switched: the bases are frozen, writes go to the redo logs.
    Frozen,
    /// The backup's manifest is in its place.
    Sealed,
    /// The redo logs are being copied into the bases, which are mixtures meanwhile.
    Committing,
    /// The bases are complete and take the writes; the redo logs are leftovers.
    Flipped,
}

/// Whose word decides whether a prepared switch happened.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum DecidedBy {
    /// This very record: [`Step::Frozen`] here means it happened.
    Job,
    /// The group record in the pool with this id.
    Pool(Uuid),
    /// The job record of another VM of the same cut, which names the same group and says [`DecidedBy::Job`].
    FirstJob,
    /// As [`DecidedBy::Job`], and all other VMs of the cut know: this record may go.
    Known,
}

/// One state of a job.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct State {
    /// How far it is.
    pub step: Step,
    /// Names the cut; pools call it the group id.
    pub group: Uuid,
    /// Whose word counts.
    pub decided_by: DecidedBy,
    /// Bit `n`: disk `n` of the payload is back on its base, which is complete; its redo logs are leftovers.
    pub flipped: u64,
}

impl State {
    /// Disk `number` of the payload is back on its base.
    pub fn is_flipped(&self, number: usize) -> bool {
        self.flipped >> number & 1 != 0
    }
}

/// What the job is about; never changes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Payload {
    /// Path of the VMX on the datastore.
    pub vmx: String,
    /// The disks that switch, at most 64. Their names are the new text of the VMX: recovery sets these slots and
    /// leaves everything else in it alone, as the VM may have got another disk since.
    pub disks: Vec<Switched>,
    /// VMs of the same cut, this one included.
    pub vms: u32,
    /// Where the backup goes; empty when the redo log is not for a backup.
    pub repository: String,
    /// Begin of the job, RFC 3339.
    pub begun_at: String,
}

/// One disk that goes to a redo log.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Switched {
    /// Slot in the VMX, such as `scsi0:0`.
    pub slot: String,
    /// UUID of the volume that it lies on.
    pub volume: String,
    /// Descriptor that becomes the frozen base.
    pub base: String,
    /// Its CID when the job began.
    pub base_cid: u32,
    /// Descriptors of the redo logs above the base, lowest first. A job makes one; a chain that was found without a
    /// record may have more.
    pub redos: Vec<String>,
}

/// What is wrong with a job record.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// Neither slot holds a state: torn, foreign, or never written.
    #[error("no job record: neither slot is valid")]
    NotThere,
    /// Written by a newer program.
    #[error("the job record has format {found}; this program knows up to {known}: use the newer program")]
    Newer {
        /// Version found.
        found: u32,
        /// Newest version known.
        known: u32,
    },
    /// The state is sound and the payload is not.
    #[error("the job record is damaged: {0}")]
    Damaged(&'static str),
    /// The names and texts do not fit into the record.
    #[error("the job's names and texts take {bytes} bytes; the record holds {PAYLOAD_MOST}")]
    TooLong {
        /// Length of the payload.
        bytes: usize,
    },
    /// The datastore failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawState {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    sequence: U64,
    step: U32,
    decided_by: U32,
    group: [u8; 16],
    pool: [u8; 16],
    flipped: U64,
    payload_bytes: U32,
    payload_crc: U32,
    spare: [u8; 432],
}

const _: () = assert!(size_of::<RawState>() == SECTOR_BYTES as usize);

impl RawState {
    fn checksum(&self) -> u32 {
        let mut copy = *self;
        copy.crc = U32::ZERO;
        crc32c::crc32c(copy.as_bytes())
    }

    fn check(&self) -> Result<(State, u64), JobError> {
        if self.magic != MAGIC || self.crc.get() != self.checksum() {
            return Err(JobError::NotThere);
        }
        if self.version.get() > JOB_VERSION {
            return Err(JobError::Newer { found: self.version.get(), known: JOB_VERSION });
        }
        let step = match self.step.get() {
            1 => Step::Intent,
            2 => Step::Prepared,
            3 => Step::Frozen,
            4 => Step::Sealed,
            5 => Step::Committing,
            6 => Step::Flipped,
            _ => return Err(JobError::Damaged("an unknown step")),
        };
        let decided_by = match self.decided_by.get() {
            1 => DecidedBy::Job,
            2 => DecidedBy::Pool(Uuid::from_bytes(self.pool)),
            3 => DecidedBy::FirstJob,
            4 => DecidedBy::Known,
            _ => return Err(JobError::Damaged("an unknown decider")),
        };
        let group = Uuid::from_bytes(self.group);
        Ok((State { step, group, decided_by, flipped: self.flipped.get() }, self.sequence.get()))
    }
}

/// A job record on its file.
pub struct JobRecord {
    disk: Rc<dyn Disk>,
    /// What the job is about.
    pub payload: Payload,
    payload_bytes: u32,
    payload_crc: u32,
    sequence: Cell<u64>,
    state: RefCell<State>,
}

impl JobRecord {
    /// Writes a new record over `disk` ([`JOB_BYTES`] long, its blocks allocated and zeroed): payload, flush, first
    /// state, flush.
    pub async fn create(disk: Rc<dyn Disk>, payload: Payload, state: State) -> Result<Self, JobError> {
        let text = serde_json::to_vec(&payload).map_err(|_| JobError::Damaged("the payload is no JSON"))?;
        if text.len() > PAYLOAD_MOST || payload.disks.len() > MOST_DISKS {
            return Err(JobError::TooLong { bytes: text.len() });
        }
        let mut padded = block::Buffer::zeroed(text.len().next_multiple_of(SECTOR_BYTES as usize));
        padded[..text.len()].copy_from_slice(&text);
        disk.write(PAYLOAD_AT, &Segments::new(&padded), Safe::AtNextFlush).await?;
        disk.flush().await?;
        let (payload_bytes, payload_crc) = (text.len() as u32, crc32c::crc32c(&text));
        let record = Self {
            disk,
            payload,
            payload_bytes,
            payload_crc,
            sequence: Cell::new(0),
            state: RefCell::new(state),
        };
        record.set(state).await?;
        Ok(record)
    }

    /// Reads a record.
    pub async fn open(disk: Rc<dyn Disk>) -> Result<Self, JobError> {
        if disk.shape().bytes() < JOB_BYTES {
            return Err(JobError::NotThere);
        }
        let mut slots = block::Buffer::zeroed(2 * SECTOR_BYTES as usize);
        disk.read(Sector(0), &SegmentsMut::new(&mut slots)).await?;
        let mut best: Option<(State, u64, RawState)> = None;
        for slot in slots.chunks(SECTOR_BYTES as usize) {
            let Ok(raw) = RawState::read_from_bytes(slot) else { continue };
            match raw.check() {
                Ok((state, sequence)) if best.as_ref().is_none_or(|b| b.1 < sequence) => {
                    best = Some((state, sequence, raw));
                }
                Ok(_) | Err(JobError::NotThere) => {}
                Err(error) => return Err(error),
            }
        }
        let Some((state, sequence, raw)) = best else { return Err(JobError::NotThere) };
        let (length, crc) = (raw.payload_bytes.get(), raw.payload_crc.get());
        if length as usize > PAYLOAD_MOST {
            return Err(JobError::Damaged("the payload is longer than the record"));
        }
        let mut text = block::Buffer::zeroed((length as usize).next_multiple_of(SECTOR_BYTES as usize));
        disk.read(PAYLOAD_AT, &SegmentsMut::new(&mut text)).await?;
        let text = &text[..length as usize];
        if crc32c::crc32c(text) != crc {
            return Err(JobError::Damaged("the payload's checksum is wrong"));
        }
        let payload: Payload =
            serde_json::from_slice(text).map_err(|_| JobError::Damaged("the payload is no job"))?;
        if payload.disks.len() > MOST_DISKS {
            return Err(JobError::Damaged("more disks than a VM has slots"));
        }
        Ok(Self {
            disk,
            payload,
            payload_bytes: length,
            payload_crc: crc,
            sequence: Cell::new(sequence),
            state: RefCell::new(state),
        })
    }

    /// The state as last written.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Writes the next state and makes it durable: one sector and one flush, no allocation.
    pub async fn set(&self, state: State) -> Result<(), JobError> {
        self.write(state).await?;
        self.disk.flush().await?;
        Ok(())
    }

    /// Writes the next state; it is durable after the disk's next flush.
    async fn write(&self, state: State) -> Result<(), JobError> {
        let sequence = self.sequence.get() + 1;
        let (decided_by, pool) = match state.decided_by {
            DecidedBy::Job => (1, [0; 16]),
            DecidedBy::Pool(pool) => (2, pool.into_bytes()),
            DecidedBy::FirstJob => (3, [0; 16]),
            DecidedBy::Known => (4, [0; 16]),
        };
        let mut raw = RawState {
            magic: MAGIC,
            version: U32::new(JOB_VERSION),
            crc: U32::ZERO,
            sequence: U64::new(sequence),
            step: U32::new(match state.step {
                Step::Intent => 1,
                Step::Prepared => 2,
                Step::Frozen => 3,
                Step::Sealed => 4,
                Step::Committing => 5,
                Step::Flipped => 6,
            }),
            decided_by: U32::new(decided_by),
            group: state.group.into_bytes(),
            pool,
            flipped: U64::new(state.flipped),
            payload_bytes: U32::new(self.payload_bytes),
            payload_crc: U32::new(self.payload_crc),
            spare: [0; 432],
        };
        raw.crc = U32::new(raw.checksum());
        self.disk.write(Sector(sequence % 2), &Segments::new(raw.as_bytes()), Safe::OnReturn).await?;
        self.sequence.set(sequence);
        *self.state.borrow_mut() = state;
        Ok(())
    }

    /// As [`JobRecord::set`], keeping everything but the step.
    pub async fn step(&self, step: Step) -> Result<(), JobError> {
        self.set(State { step, ..self.state() }).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::MemoryDisk;
    use block::crash::CrashLog;

    fn payload() -> Payload {
        Payload {
            vmx: "sql/sql.vmx".into(),
            disks: (0..40)
                .map(|n| Switched {
                    slot: format!("scsi0:{n}"),
                    volume: "5fbaa8a0-12345678-9abc-0123456789ab".into(),
                    base: format!("/sql/c{n}.vmdk"),
                    base_cid: 7,
                    redos: vec![format!("/sql/c{n}-000001.vmdk")],
                })
                .collect(),
            vms: 1,
            repository: "/backup".into(),
            begun_at: "2026-11-23T17:38:00Z".into(),
        }
    }

    const START: State =
        State { step: Step::Intent, group: Uuid::from_u128(5), decided_by: DecidedBy::Job, flipped: 0 };

    #[test]
    fn a_crash_leaves_one_of_two_neighbouring_states() {
        lane::block_on(async {
            let log = CrashLog::new(1);
            let disk = log.disk(JOB_BYTES / SECTOR_BYTES);
            let record = JobRecord::create(disk, payload(), START).await.unwrap();
            let mut reached = vec![(log.points(), Step::Intent)];
            for step in [Step::Prepared, Step::Frozen, Step::Sealed, Step::Committing, Step::Flipped] {
                record.step(step).await.unwrap();
                reached.push((log.points(), step));
            }
            for point in 0..=log.points() {
                let done = reached.iter().rev().find(|(at, _)| *at <= point).map(|(_, step)| *step);
                let next = reached.iter().find(|(at, _)| *at > point).map(|(_, step)| *step);
                for seed in 0..8 {
                    let image = MemoryDisk::from(log.cut(point, seed).remove(0));
                    match JobRecord::open(Rc::new(image)).await {
                        Ok(record) => {
                            let found = record.state().step;
                            assert!(Some(found) == done || Some(found) == next, "{found:?} at {point}");
                            assert_eq!(record.payload, payload());
                        }
                        Err(JobError::NotThere) => assert_eq!(done, None, "at {point}"),
                        Err(error) => panic!("at {point}: {error}"),
                    }
                }
            }
        });
    }

    #[test]
    fn the_golden_job_record_opens_and_is_still_made() {
        lane::block_on(async {
            let disk = Rc::new(MemoryDisk::new(JOB_BYTES / SECTOR_BYTES));
            let payload = Payload { disks: payload().disks[..2].to_vec(), ..payload() };
            let record = JobRecord::create(disk.clone(), payload.clone(), START).await.unwrap();
            let decided_by = DecidedBy::Pool(Uuid::from_u128(0x1234_5678));
            record.set(State { step: Step::Prepared, decided_by, ..START }).await.unwrap();
            let last = State { step: Step::Committing, decided_by, flipped: 2, ..START };
            record.set(last).await.unwrap();
            let made = disk.to_bytes();
            // Two states and the payload; the rest is zero.
            let used = PAYLOAD_AT.bytes() as usize + 1024;
            assert!(made[used..].iter().all(|b| *b == 0));
            let golden = crate::tests::golden("job-record-1.bin", &made[..used]);
            assert!(made[..used] == *golden, "the format changed");
            let mut whole = golden;
            whole.resize(JOB_BYTES as usize, 0);
            let opened = JobRecord::open(Rc::new(MemoryDisk::from_bytes(&whole))).await.unwrap();
            assert_eq!((opened.state(), &opened.payload), (last, &payload));
        });
    }

    #[test]
    fn damage_and_newer_formats_are_told_apart() {
        lane::block_on(async {
            let disk = Rc::new(MemoryDisk::new(JOB_BYTES / SECTOR_BYTES));
            assert!(matches!(JobRecord::open(disk.clone()).await, Err(JobError::NotThere)));
            drop(JobRecord::create(disk.clone(), payload(), START).await.unwrap());
            let good = disk.to_bytes();
            let mut bad = good.clone();
            bad[5000] ^= 1;
            let found = JobRecord::open(Rc::new(MemoryDisk::from_bytes(&bad))).await;
            assert!(matches!(found, Err(JobError::Damaged(_))));
            let mut raw = RawState::read_from_bytes(&good[512..1024]).unwrap();
            raw.version = U32::new(9);
            raw.crc = U32::new(raw.checksum());
            let mut newer = good;
            newer[512..1024].copy_from_slice(raw.as_bytes());
            let found = JobRecord::open(Rc::new(MemoryDisk::from_bytes(&newer))).await;
            assert!(matches!(found, Err(JobError::Newer { found: 9, known: JOB_VERSION })));
            let said = found.err().unwrap().to_string();
            assert!(said.contains("format 9") && said.contains("up to 1"), "{said}");
        });
    }
}
