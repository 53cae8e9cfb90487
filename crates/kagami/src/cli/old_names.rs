//! Names that old hands of ESX type, as thin aliases of ours: the words are turned into ours, and that is all. `vmsnap` and
//! `vmres` need no turning.

use clap::{Args, ValueEnum};

use super::args::{DiskVerb, Noun, Provisioning, RdmMode, RdmVerb};
use crate::problem::{Outcome, Problem};

/// Arguments of `vmkfstools`.
#[derive(Args, Debug)]
pub struct VmkfstoolsArgs {
    /// Map this LUN, virtual mode: rdm create
    #[arg(short = 'r', long = "createrdm", value_name = "LUN", group = "what")]
    pub create_rdm: Option<String>,
    /// Map this LUN, physical mode: rdm create --mode physical
    #[arg(short = 'z', long = "createrdmpassthru", value_name = "LUN", group = "what")]
    pub create_rdm_passthru: Option<String>,
    /// Make a disk of this size: disk create
    #[arg(short = 'c', long = "createvirtualdisk", value_name = "SIZE", group = "what")]
    pub create_disk: Option<String>,
    /// How the disk's space is taken
    #[arg(
        short = 'd',
        long = "diskformat",
        value_enum,
        default_value = "zeroedthick",
        requires = "create_disk"
    )]
    pub disk_format: DiskFormat,
    /// /vmfs/volumes/DATASTORE/DIR/NAME.vmdk or DATASTORE:DIR/NAME.vmdk
    pub path: String,
}

/// Formats of disks, as ESX calls them.
#[derive(Copy, Clone, PartialEq, Eq, Debug, ValueEnum)]
pub enum DiskFormat {
    /// Blocks when they are first written.
    Thin,
    /// All blocks now, zeroed when first written.
    Zeroedthick,
    /// All blocks now, zeroed now.
    Eagerzeroedthick,
}

/// A path as ESX has it, as ours.
fn our_path(path: &str) -> String {
    let inside = path.strip_prefix("/vmfs/volumes/").and_then(|rest| rest.split_once('/'));
    inside.map_or_else(|| path.to_owned(), |(datastore, file)| format!("{datastore}:{file}"))
}

/// A LUN by its device, as ESX has it: by what comes last.
fn our_lun(lun: &str) -> String {
    lun.strip_prefix("/vmfs/devices/disks/").unwrap_or(lun).to_owned()
}

/// `vmkfstools` in our words.
pub fn vmkfstools(args: &VmkfstoolsArgs) -> Outcome<Noun> {
    let disk = our_path(&args.path);
    let map = |lun: &String, mode| Noun::Rdm(RdmVerb::Create { disk: disk.clone(), lun: our_lun(lun), mode });
    match (&args.create_rdm, &args.create_rdm_passthru, &args.create_disk) {
        (Some(lun), _, _) => Ok(map(lun, RdmMode::Virtual)),
        (_, Some(lun), _) => Ok(map(lun, RdmMode::Physical)),
        (_, _, Some(size)) => {
            let provisioning = match args.disk_format {
                DiskFormat::Thin => Provisioning::Thin,
                DiskFormat::Zeroedthick => Provisioning::Thick,
                DiskFormat::Eagerzeroedthick => Provisioning::Eager,
            };
            Ok(Noun::Disk(DiskVerb::Create { disk, size: size.to_uppercase(), provisioning }))
        }
        (None, None, None) => Err(Problem::usage("vmkfstools does nothing without an option")
            .why("-r, -z and -c are known here")
            .hint("kagami disk --help, kagami rdm --help: what the others are called")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_as_esx_writes_them() {
        assert_eq!(our_path("/vmfs/volumes/ds1/a/b.vmdk"), "ds1:a/b.vmdk");
        assert_eq!(our_path("ds1:a/b.vmdk"), "ds1:a/b.vmdk");
        assert_eq!(our_lun("/vmfs/devices/disks/naa.6024b4"), "naa.6024b4");
    }
}
