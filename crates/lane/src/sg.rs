//! SCSI commands to a disk of the host, as they are: Linux' SG_IO (linux `include/scsi/sg.h`, version 3 of the interface).
#![allow(unsafe_code)] // ioctl with memory of ours; each use has its reason

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::pool::on_worker;
use crate::{Segments, SegmentsMut};

const SG_IO: libc::c_ulong = 0x2285;
const SG_SCSI_RESET: libc::c_ulong = 0x2284;
const SG_SCSI_RESET_DEVICE: libc::c_int = 1;
const TO_DEVICE: i32 = -2;
const FROM_DEVICE: i32 = -3;
const NO_DATA: i32 = -1;
/// Longest CDB that SG_IO takes.
const CDB_BYTES_MAX: usize = 32;
/// Room for sense data: as much as one byte of length can say.
const SENSE_BYTES: usize = 252;

/// `struct sg_io_hdr`.
#[repr(C)]
struct Header {
    interface: i32,
    direction: i32,
    cdb_length: u8,
    sense_room: u8,
    pieces: u16,
    data_length: u32,
    data: *const libc::iovec,
    cdb: *const u8,
    sense: *mut u8,
    timeout_ms: u32,
    flags: u32,
    pack_id: i32,
    user: *mut libc::c_void,
    status: u8,
    masked_status: u8,
    message_status: u8,
    sense_written: u8,
    host_status: u16,
    driver_status: u16,
    residual: i32,
    duration: u32,
    info: u32,
}

const _: () = assert!(size_of::<Header>() == 88);

/// What the device answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SgReply {
    /// SCSI status byte.
    pub status: u8,
    /// Sense data, empty without.
    pub sense: Vec<u8>,
    /// Bytes that were moved.
    pub moved: usize,
}

/// A SCSI disk of the host (`/dev/sdX`).
pub struct SgDisk {
    fd: Arc<OwnedFd>,
    path: PathBuf,
    transfer_bytes_max: u64,
}

/// Everything that one ioctl uses; the data are the caller's.
struct Request {
    fd: Arc<OwnedFd>,
    cdb: Vec<u8>,
    pieces: Vec<libc::iovec>,
    length: u32,
    direction: i32,
    timeout_ms: u32,
}

// SAFETY: the addresses in `pieces` are those of memory that stays valid while the request is under way: dropping the future
// before that aborts the process (`UnderWay`), and nobody else writes to it meanwhile (`SegmentsMut`).
unsafe impl Send for Request {}

/// See the crate: dropped while the kernel has the memory, the process must not go on.
struct UnderWay {
    over: bool,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if !self.over {
            crate::dropped_in_flight();
        }
    }
}

impl Request {
    fn execute(self) -> io::Result<SgReply> {
        let mut sense = vec![0; SENSE_BYTES];
        let mut header = Header {
            interface: i32::from(b'S'),
            direction: self.direction,
            cdb_length: self.cdb.len() as u8,
            sense_room: SENSE_BYTES as u8,
            pieces: self.pieces.len() as u16,
            data_length: self.length,
            data: self.pieces.as_ptr(),
            cdb: self.cdb.as_ptr(),
            sense: sense.as_mut_ptr(),
            timeout_ms: self.timeout_ms,
            flags: 0,
            pack_id: 0,
            user: std::ptr::null_mut(),
            status: 0,
            masked_status: 0,
            message_status: 0,
            sense_written: 0,
            host_status: 0,
            driver_status: 0,
            residual: 0,
            duration: 0,
            info: 0,
        };
        // SAFETY: the header is laid out as SG_IO wants it, and every address in it is valid for its length until the call
        // returns: CDB and sense are ours, the data are promised by `SgDisk::execute`.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), SG_IO as _, &raw mut header) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // Host status: the command did not get through, or no answer came back.
        if header.host_status != 0 {
            let text = format!("the host adapter says {:#x}", header.host_status);
            return Err(io::Error::other(text));
        }
        sense.truncate(usize::from(header.sense_written).min(SENSE_BYTES));
        let left = u32::try_from(header.residual).unwrap_or(0).min(self.length);
        Ok(SgReply { status: header.status, sense, moved: (self.length - left) as usize })
    }
}

impl SgDisk {
    /// Opens a block device. `InvalidInput` when it is something else; `Unsupported` when it takes no SCSI commands.
    pub async fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref().to_owned();
        on_worker(move || {
            let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
            let file = std::fs::OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path)?;
            let about = file.metadata()?;
            if !about.file_type().is_block_device() {
                return Err(ErrorKind::InvalidInput.into());
            }
            let (major, minor) = (libc::major(about.rdev()), libc::minor(about.rdev()));
            let limit = format!("/sys/dev/block/{major}:{minor}/queue/max_sectors_kb");
            let limit = std::fs::read_to_string(limit)?;
            let kib: u64 = limit.trim().parse().map_err(|_| io::Error::from(ErrorKind::InvalidData))?;
            let mut version: libc::c_int = 0;
            const SG_GET_VERSION_NUM: libc::c_ulong = 0x2282;
            // SAFETY: writes one int.
            let known = unsafe { libc::ioctl(file.as_raw_fd(), SG_GET_VERSION_NUM as _, &raw mut version) };
            if known < 0 || version < 30000 {
                return Err(ErrorKind::Unsupported.into());
            }
            Ok(Self { fd: Arc::new(file.into()), path, transfer_bytes_max: kib * 1024 })
        })
        .await
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Most bytes that one command can move.
    pub fn transfer_bytes_max(&self) -> u64 {
        self.transfer_bytes_max
    }

    /// Executes a command; at most one of `from` and `into` has a length. `InvalidInput`: a CDB that is too long, data both
    /// ways or too much or in too many pieces. Other errors: the command did not get through.
    pub async fn execute(
        &self,
        cdb: &[u8],
        from: &Segments<'_>,
        into: &SegmentsMut<'_>,
        timeout: Duration,
    ) -> io::Result<SgReply> {
        let (direction, data): (i32, &Segments<'_>) = match (from.is_empty(), into.is_empty()) {
            (true, true) => (NO_DATA, from),
            (false, true) => (TO_DEVICE, from),
            (true, false) => (FROM_DEVICE, into),
            (false, false) => return Err(ErrorKind::InvalidInput.into()),
        };
        let pieces = data.iovecs().to_vec();
        let too_much = data.len() as u64 > self.transfer_bytes_max || pieces.len() > usize::from(u16::MAX);
        if cdb.is_empty() || cdb.len() > CDB_BYTES_MAX || too_much {
            return Err(ErrorKind::InvalidInput.into());
        }
        let request = Request {
            fd: Arc::clone(&self.fd),
            cdb: cdb.to_vec(),
            pieces,
            length: data.len() as u32,
            direction,
            timeout_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
        };
        let mut under_way = UnderWay { over: false };
        let result = on_worker(move || request.execute()).await;
        under_way.over = true;
        result
    }

    /// Resets the logical unit.
    pub async fn reset(&self) -> io::Result<()> {
        let fd = Arc::clone(&self.fd);
        on_worker(move || {
            let mut what = SG_SCSI_RESET_DEVICE;
            // SAFETY: reads one int.
            let result = unsafe { libc::ioctl(fd.as_raw_fd(), SG_SCSI_RESET as _, &raw mut what) };
            if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_scsi_disk_is_refused() {
        crate::block_on(async {
            let file = std::env::temp_dir().join(format!("lane-sg-{}", std::process::id()));
            std::fs::write(&file, [0; 512]).unwrap();
            for path in [file.as_path(), Path::new("/dev/null")] {
                let refused = SgDisk::open(path).await.err().map(|e| e.kind());
                assert!(
                    matches!(refused, Some(ErrorKind::InvalidInput | ErrorKind::PermissionDenied)),
                    "{refused:?}"
                );
            }
            std::fs::remove_file(&file).unwrap();
        });
    }
}
