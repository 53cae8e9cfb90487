//! Lock blocks and heartbeats.

use super::{Corrupt, Expected, HEARTBEAT_OFFSET, VmfsUuid, ensure, text};
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a lock block protects: the low byte of its type word 0x10C000xx.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum LockKind {
    /// A file descriptor.
    Descriptor = 0x10C0_0001,
    /// A cluster of file blocks (VMFS-6: small).
    FileBlocks = 0x10C0_0002,
    /// A cluster of sub-blocks.
    SubBlocks = 0x10C0_0003,
    /// A cluster of pointer blocks.
    PointerBlocks = 0x10C0_0004,
    /// A cluster of file descriptors.
    Descriptors = 0x10C0_0005,
    /// A cluster of `.pb2.sf`.
    PointerBlocks2 = 0x10C0_0006,
    /// A cluster of journal blocks.
    Journals = 0x10C0_0007,
    /// A cluster of large file blocks.
    LargeBlocks = 0x10C0_0008,
    /// A block of `.unmap.sf`.
    Unmap = 0x10C0_0009,
}

/// How a lock is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// By nobody.
    Free,
    /// By one host alone.
    Exclusive,
    /// By readers.
    Shared,
    /// By several writers.
    MultiWriter,
}

/// Lock block: the first metadata block of every FD and of every cluster header.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LockBlock {
    /// See [`LockKind`].
    pub kind: U32,
    /// Own offset in the volume.
    pub offset: U64,
    /// Volume offset of the last holder's heartbeat; 0 never locked.
    pub heartbeat: U64,
    /// Generation of that heartbeat when locked.
    pub heartbeat_generation: U64,
    /// Plus one at each lock and at each unlock; starts at 1 in cluster headers, at the FD's generation in FDs.
    pub token: U64,
    /// 0 free, 1 exclusive, 2 shared, 3 multi-writer.
    pub mode: U32,
    /// Host that holds it.
    pub holder: VmfsUuid,
    /// Logical clock of the host, plus one at each lock operation.
    pub clock: U64,
    /// Holders besides the first.
    pub extra_holders: U32,
    /// Records of those.
    pub holders: [u8; 256],
    /// Global holders and break counters.
    pub spare: [u8; 188],
}
const _: () = assert!(size_of::<LockBlock>() == 512);
const _: () = assert!(offset_of!(LockBlock, token) == 0x1C);
const _: () = assert!(offset_of!(LockBlock, holder) == 0x28);
const _: () = assert!(offset_of!(LockBlock, clock) == 0x38);

impl LockBlock {
    /// A lock that nobody ever held.
    pub fn free(kind: LockKind, offset: u64, token: u64, clock: u64) -> Self {
        Self {
            kind: (kind as u32).into(),
            offset: offset.into(),
            heartbeat: 0.into(),
            heartbeat_generation: 0.into(),
            token: token.into(),
            mode: 0.into(),
            holder: VmfsUuid::NONE,
            clock: clock.into(),
            extra_holders: 0.into(),
            holders: [0; 256],
            spare: [0; 188],
        }
    }

    /// Type, own offset and mode are right.
    pub fn check(&self, kind: LockKind, offset: u64) -> Result<LockMode, Corrupt> {
        let found = self.kind.get();
        ensure(found == kind as u32, "lock type", offset, found.into(), Expected::Value(kind as u64))?;
        let own = self.offset.get();
        ensure(own == offset, "lock's own address", offset + 4, own, Expected::Value(offset))?;
        match self.mode.get() {
            0 => Ok(LockMode::Free),
            1 => Ok(LockMode::Exclusive),
            2 => Ok(LockMode::Shared),
            3 => Ok(LockMode::MultiWriter),
            found => Err(Corrupt {
                what: "lock mode",
                at: offset + 0x24,
                found: found.into(),
                expected: Expected::AtMost(3),
            }),
        }
    }
}

/// Value of [`Heartbeat::state`]: nobody's.
pub const HEARTBEAT_FREE: u32 = 0xABCD_EF01;
/// Value of [`Heartbeat::state`]: a host has the volume open.
pub const HEARTBEAT_IN_USE: u32 = 0xABCD_EF02;

/// Offsets in the volume of all heartbeat slots: 2048 of 512 bytes, VMFS-6: 1024 of 4096 bytes.
pub fn heartbeat_slots(version: u8) -> impl Iterator<Item = u64> {
    let (count, step) = if version == 6 { (1024, 4096) } else { (2048, 512) };
    (0..count).map(move |i| HEARTBEAT_OFFSET + i * step)
}

/// Heartbeat slot.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Heartbeat {
    /// [`HEARTBEAT_FREE`] or [`HEARTBEAT_IN_USE`].
    pub state: U32,
    /// Own offset in the volume.
    pub offset: U64,
    /// Plus one when acquired, plus one when released.
    pub generation: U64,
    /// Uptime of the host in microseconds, rewritten every few seconds.
    pub stamp_us: U64,
    /// The host.
    pub host: VmfsUuid,
    /// Its journal's address, 0 none.
    pub journal: U32,
    /// File system version, major.
    pub fs_major: U32,
    /// File system version, minor.
    pub fs_minor: u8,
    /// Implementation of locks: 3 shared, 1 local.
    pub lock_kind: u8,
    /// The host's IP address as text.
    pub ip: [u8; 46],
    /// Volume offset of its journal.
    pub journal_offset: U64,
    /// Replay fields and the rest.
    pub spare: [u8; 404],
}
const _: () = assert!(size_of::<Heartbeat>() == 512);
const _: () = assert!(offset_of!(Heartbeat, host) == 0x1C);
const _: () = assert!(offset_of!(Heartbeat, ip) == 0x36);
const _: () = assert!(offset_of!(Heartbeat, journal_offset) == 0x64);

impl Heartbeat {
    /// A slot nobody ever used.
    pub fn free(offset: u64) -> Self {
        Self {
            state: HEARTBEAT_FREE.into(),
            offset: offset.into(),
            generation: 0.into(),
            stamp_us: 0.into(),
            host: VmfsUuid::NONE,
            journal: 0.into(),
            fs_major: 0.into(),
            fs_minor: 0,
            lock_kind: 0,
            ip: [0; 46],
            journal_offset: 0.into(),
            spare: [0; 404],
        }
    }

    /// Takes the slot for a host.
    pub fn acquire(&mut self, host: VmfsUuid, stamp_us: u64) {
        self.state = HEARTBEAT_IN_USE.into();
        self.generation += 1;
        self.stamp_us = stamp_us.into();
        self.host = host;
    }

    /// Gives the slot back; it tells who had it last.
    pub fn release(&mut self) {
        self.state = HEARTBEAT_FREE.into();
        self.generation += 1;
    }

    /// Somebody has the volume open, or died with it open.
    pub fn in_use(&self) -> bool {
        self.state.get() == HEARTBEAT_IN_USE
    }

    /// The host's address as text.
    pub fn ip_text(&self) -> String {
        text(&self.ip)
    }
}
