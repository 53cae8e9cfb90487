//! The kinds of disks and extents, as they stand in the text (semantics page, chapter 3, its table).

use std::fmt;

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $first:literal $(| $other:literal)*,)* }) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Debug, Hash)]
        pub enum $name {
            $($(#[$vdoc])* $variant,)*
            /// A word that is not in the table; kept as it stands. Never opened, always shown.
            Other(String),
        }
        impl $name {
            /// Recognises a word, whatever its case.
            pub fn from_text(text: &str) -> Self {
                $(if text.eq_ignore_ascii_case($first) $(|| text.eq_ignore_ascii_case($other))* {
                    return Self::$variant;
                })*
                Self::Other(text.to_owned())
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $(Self::$variant => $first,)*
                    Self::Other(text) => text,
                })
            }
        }
    };
}

words! {
    /// What kind of disk a descriptor describes.
    CreateType {
        /// Flat on VMFS; thin when `ddb.thinProvisioned = "1"`.
        Vmfs = "vmfs",
        /// Flat on VMFS, older name: blocks allocated, zeroed at first touch.
        VmfsPreallocated = "vmfsPreallocated",
        /// Flat on VMFS, older name: blocks allocated and zeroed.
        VmfsEagerZeroedThick = "vmfsEagerZeroedThick",
        /// Flat on VMFS, older name: blocks allocated at first write.
        VmfsThin = "vmfsThin",
        /// Raw device mapping, virtual mode.
        VmfsRawDeviceMap = "vmfsRawDeviceMap" | "vmfsRDM",
        /// Raw device mapping, physical mode.
        VmfsPassthroughRawDeviceMap = "vmfsPassthroughRawDeviceMap" | "vmfsRDMP",
        /// Redo log in the COWD format.
        VmfsSparse = "vmfsSparse",
        /// Redo log in the SEsparse format.
        SeSparse = "seSparse",
        /// A raw device without a mapping file.
        VmfsRaw = "vmfsRaw",
        /// One sparse file (Workstation).
        MonolithicSparse = "monolithicSparse",
        /// One compressed sparse file (OVF).
        StreamOptimized = "streamOptimized",
        /// Sparse files of at most 2 GB.
        TwoGbMaxExtentSparse = "twoGbMaxExtentSparse",
        /// Flat files of at most 2 GB.
        TwoGbMaxExtentFlat = "twoGbMaxExtentFlat",
        /// One flat file.
        MonolithicFlat = "monolithicFlat",
    }
}

words! {
    /// What the file of an extent is.
    ExtentKind {
        /// Raw bytes, from an offset on.
        Flat = "FLAT",
        /// A hosted sparse file ("KDMV").
        Sparse = "SPARSE",
        /// Reads as zero; no file.
        Zero = "ZERO",
        /// Raw bytes on VMFS.
        Vmfs = "VMFS",
        /// A COWD redo log.
        VmfsSparse = "VMFSSPARSE",
        /// An SEsparse redo log.
        SeSparse = "SESPARSE",
        /// A mapping file.
        VmfsRdm = "VMFSRDM",
        /// A raw device.
        VmfsRaw = "VMFSRAW",
    }
}

impl CreateType {
    /// Data blocks of a file on VMFS.
    pub fn is_vmfs_flat(&self) -> bool {
        matches!(self, Self::Vmfs | Self::VmfsPreallocated | Self::VmfsEagerZeroedThick | Self::VmfsThin)
    }

    /// A raw device mapping, in either mode.
    pub fn is_rdm(&self) -> bool {
        matches!(self, Self::VmfsRawDeviceMap | Self::VmfsPassthroughRawDeviceMap)
    }

    /// The kind of extent that belongs to it; `None` for a word we do not know.
    pub fn extent_kind(&self) -> Option<ExtentKind> {
        Some(match self {
            Self::Vmfs | Self::VmfsPreallocated | Self::VmfsEagerZeroedThick | Self::VmfsThin => {
                ExtentKind::Vmfs
            }
            Self::VmfsRawDeviceMap | Self::VmfsPassthroughRawDeviceMap => ExtentKind::VmfsRdm,
            Self::VmfsSparse => ExtentKind::VmfsSparse,
            Self::SeSparse => ExtentKind::SeSparse,
            Self::VmfsRaw => ExtentKind::VmfsRaw,
            Self::MonolithicSparse | Self::StreamOptimized | Self::TwoGbMaxExtentSparse => ExtentKind::Sparse,
            Self::TwoGbMaxExtentFlat | Self::MonolithicFlat => ExtentKind::Flat,
            Self::Other(_) => return None,
        })
    }
}

/// What may be done with an extent.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Access {
    /// Read and write.
    ReadWrite,
    /// Read only.
    ReadOnly,
    /// Nothing.
    None,
}

impl Access {
    /// The word in the text.
    pub fn word(self) -> &'static str {
        match self {
            Self::ReadWrite => "RW",
            Self::ReadOnly => "RDONLY",
            Self::None => "NOACCESS",
        }
    }

    pub(super) fn from_word(word: &[u8]) -> Option<Self> {
        [Self::ReadWrite, Self::ReadOnly, Self::None].into_iter().find(|a| a.word().as_bytes() == word)
    }
}
