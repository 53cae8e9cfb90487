//! The nouns every stage shares: [`Disk`], [`Sector`], [`Segments`], [`DiskError`], [`Gate`].
//!
//! One trait goes all the way of a write, from the wire to the medium. Any two stages can be joined in a test, and
//! any decorator fits between any two.

pub mod conformance;
pub mod crash;
pub mod decorate;
mod disk;
mod error;
mod extents;
pub mod fuzz;
mod gate;
mod memory_disk;
mod pages;
mod range_lock;
mod sector;

pub use disk::{Disk, Io, Safe, Shape};
pub use error::{DiskError, MediumFault};
pub use extents::{Extent, Extents, Generation, Kind};
pub use gate::{Alone, Gate, Pass};
pub use lane::{Buffer, Segments, SegmentsMut};
pub use memory_disk::{Image, MemoryDisk};
pub use pages::Pages;
pub use range_lock::{Locked, RangeLock};
pub use sector::{BLOCK_BYTES, BLOCK_SECTORS, SECTOR_BYTES, Sector, check_range};
