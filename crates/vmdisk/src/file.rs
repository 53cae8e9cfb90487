//! What an extent lies in: a file of sectors that can grow. On a datastore it is a VMFS file, elsewhere a file of
//! the host.

use block::{Disk, Io};

/// A file of sectors that can grow.
pub trait GrowingFile: Disk {
    /// Makes it at least `sectors` long (in 512-byte sectors). The new part reads as zero; the new length is durable
    /// after the next flush. A shorter length does nothing.
    fn grow(&self, sectors: u64) -> Io<'_>;

    /// The disk is thin: space that the guest unmaps goes back to where the file lies, if it can be given back.
    fn give_back_unmapped(&self) {}
}

/// A file of the host.
impl GrowingFile for media::FileDisk {
    fn grow(&self, sectors: u64) -> Io<'_> {
        Box::pin(async move {
            if self.shape().sectors >= sectors {
                return Ok(());
            }
            media::FileDisk::grow(self, sectors).await.map_err(|error| match error {
                media::MediaError::Io { source, .. } | media::MediaError::InUse(source) => source.into(),
                error @ media::MediaError::Smaller { .. } => std::io::Error::other(error).into(),
            })
        })
    }
}

/// Memory, for tests.
impl GrowingFile for block::MemoryDisk {
    fn grow(&self, sectors: u64) -> Io<'_> {
        self.resize(sectors.max(self.shape().sectors));
        Box::pin(std::future::ready(Ok(())))
    }
}

/// In crash tests a file is a disk of its largest length, so that what was never written reads as what lay there.
#[cfg(test)]
impl GrowingFile for block::crash::CrashDisk {
    fn grow(&self, sectors: u64) -> Io<'_> {
        let answer = if sectors <= self.shape().sectors { Ok(()) } else { Err(block::DiskError::NoSpace) };
        Box::pin(std::future::ready(answer))
    }
}

#[cfg(test)]
impl<P: block::decorate::Passing + 'static> GrowingFile for block::decorate::Decorated<P> {
    fn grow(&self, sectors: u64) -> Io<'_> {
        let answer = if sectors <= self.shape().sectors { Ok(()) } else { Err(block::DiskError::NoSpace) };
        Box::pin(std::future::ready(answer))
    }
}
