//! `inspect`: says what a file is and what it holds. `vmdk show`: a descriptor and its chain.

use std::io::Read;
use std::path::{Path, PathBuf};

use block::{Buffer, Disk, Sector, SegmentsMut};
use serde_json::{Value, json};
use vmdisk::descriptor::Descriptor;
use vmfs::Mode;

use super::open::open_disk;
use super::{Opened, volume};
use crate::cli::stdout_failed;
use crate::output::Show::{Size, Text};
use crate::output::{Column, Output, col};
use crate::problem::{Kind, Outcome, Problem};

/// Links of a chain that are followed.
const CHAIN_MAX: usize = 256;

/// Anything recognised.
const THING: &[Column] = &[
    col("file", "file", Text),
    col("is", "is", Text),
    col("name", "name", Text),
    col("version", "version", Text),
    col("id", "id", Text),
    col("size", "size_bytes", Size),
    col("create type", "create_type", Text),
    col("cid", "cid", Text),
    col("parent cid", "parent_cid", Text),
    col("parent", "parent", Text),
    col("extents", "extents", Text),
    col("disk database", "ddb", Text),
    col("disks", "disks", Text),
    col("differences", "differences", Text),
    col("grain", "grain_bytes", Size),
    col("dirty", "dirty", Text),
    col("block", "block_bytes", Size),
    col("holds", "holds", Text),
    col("trouble", "trouble", Text),
];

fn descriptor_row(file: &Path, descriptor: &Descriptor) -> Value {
    let extents: Vec<String> = descriptor
        .extents()
        .iter()
        .map(|e| format!("{:?} {} {:?} \"{}\" {}", e.access, e.sectors, e.kind, e.file, e.offset))
        .collect();
    let ddb: Vec<String> = descriptor.with_prefix("ddb.").map(|(k, v)| format!("{k} = {v}")).collect();
    json!({
        "file": file,
        "is": "VMDK descriptor",
        "create_type": descriptor.create_type().to_string(),
        "cid": descriptor.cid().to_string(),
        "parent_cid": descriptor.has_parent().then(|| descriptor.parent_cid().to_string()),
        "parent": descriptor.parent_hint(),
        "size_bytes": descriptor.sectors().saturating_mul(block::SECTOR_BYTES),
        "extents": extents,
        "ddb": ddb,
    })
}

fn read_descriptor(file: &Path) -> Outcome<Descriptor> {
    let title = format!("cannot read {}", file.display());
    let mut bytes = Vec::new();
    let limit = vmdisk::descriptor::MAX_BYTES as u64 + 1;
    std::fs::File::open(file).and_then(|f| f.take(limit).read_to_end(&mut bytes)).map_err(|e| {
        let kind = if e.kind() == std::io::ErrorKind::NotFound { Kind::NotFound } else { Kind::Failed };
        Problem::new("KGM-VMD-0404", kind, title.clone()).why(e)
    })?;
    Descriptor::parse(&bytes).map_err(|e| Problem::failed("KGM-VMD-0001", title, e))
}

/// A descriptor on the host, and its parents as far as they are there.
pub fn vmdk(out: &Output, file: &Path) -> Outcome {
    let mut descriptor = read_descriptor(file)?;
    let mut row = descriptor_row(file, &descriptor);
    let (mut chain, mut trouble, mut at) = (vec![file.display().to_string()], None, file.to_owned());
    while let (true, Some(hint)) = (descriptor.has_parent(), descriptor.parent_hint()) {
        let parent: PathBuf = at.parent().unwrap_or_else(|| Path::new(".")).join(hint);
        if chain.len() >= CHAIN_MAX || chain.contains(&parent.display().to_string()) {
            trouble = Some("the chain runs in a circle or is too deep".to_owned());
            break;
        }
        chain.push(parent.display().to_string());
        match read_descriptor(&parent) {
            Ok(above) if above.cid() != descriptor.parent_cid() => {
                let why =
                    format!("has CID {}, its child was made on {}", above.cid(), descriptor.parent_cid());
                trouble = Some(format!("{} {why}: it was changed since", parent.display()));
                break;
            }
            Ok(above) => (descriptor, at) = (above, parent),
            Err(problem) => {
                trouble = Some(problem.to_string());
                break;
            }
        }
    }
    row["chain"] = json!(chain);
    row["trouble"] = json!(trouble);
    const COLUMNS: &[Column] = &[
        col("file", "file", Text),
        col("create type", "create_type", Text),
        col("size", "size_bytes", Size),
        col("cid", "cid", Text),
        col("parent cid", "parent_cid", Text),
        col("extents", "extents", Text),
        col("chain", "chain", Text),
        col("disk database", "ddb", Text),
        col("trouble", "trouble", Text),
    ];
    out.object(&row, COLUMNS).map_err(stdout_failed)
}

/// Looks at whatever it is.
pub async fn inspect(out: &Output, name: &str) -> Outcome {
    let path = Path::new(name);
    if path.is_dir() {
        let row = super::super::backups::inspect(path)?;
        return out.object(&row, THING).map_err(stdout_failed);
    }
    let small = std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() <= 4 << 20);
    if small && let Some(row) = text(path)? {
        return out.object(&row, THING).map_err(stdout_failed);
    }
    let disk = open_disk(name).await?;
    let size = disk.shape().bytes();
    let mut head = Buffer::zeroed(size.min(4096) as usize / 512 * 512);
    let read = disk.read(Sector(0), &SegmentsMut::new(&mut head)).await;
    read.map_err(|e| Problem::failed("KGM-IMG-0004", format!("cannot read {name}"), e))?;
    let row = if head.starts_with(&vmdisk::redo::format::MAGIC) {
        redo(name, size, &head)
    } else if let Some(row) = super::super::pool_image::describe(path).await {
        row
    } else {
        let opened = Opened { disks: vec![disk], shown: name.to_owned() };
        match opened.volume(Mode::Read).await {
            Ok(volume) => {
                let mut row = volume::volume_row(&volume);
                row["file"] = json!(name);
                row["is"] = json!("VMFS volume");
                row["holds"] = json!(format!("kagami vmfs ls {name}"));
                row
            }
            Err(problem) if problem.code == "KGM-VFS-0002" => json!({
                "file": name,
                "is": "nothing that is known here",
                "size_bytes": size,
            }),
            Err(problem) => return Err(problem),
        }
    };
    out.object(&row, THING).map_err(stdout_failed)
}

/// A text file of ours: descriptor, VMX, VMSD.
fn text(path: &Path) -> Outcome<Option<Value>> {
    let failed =
        |e: std::io::Error| Problem::failed("KGM-IMG-0006", format!("cannot read {}", path.display()), e);
    let bytes = std::fs::read(path).map_err(failed)?;
    if let Ok(descriptor) = Descriptor::parse(&bytes) {
        return Ok(Some(descriptor_row(path, &descriptor)));
    }
    let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
    let title = || format!("cannot read {}", path.display());
    if extension == "vmx" {
        let vmx = vm::vmx::Vmx::parse(&bytes).map_err(|e| Problem::failed("KGM-VMX-0001", title(), e))?;
        let disks: Vec<String> =
            vmx.disks().iter().map(|d| format!("{} {} ({})", d.slot, d.file_name, d.mode.name())).collect();
        return Ok(Some(json!({
            "file": path,
            "is": "VM configuration",
            "name": vmx.get("displayName"),
            "id": vmx.get("uuid.bios"),
            "disks": disks,
        })));
    }
    if extension == "vmsd" {
        let vmsd = vm::vmsd::Vmsd::parse(&bytes).map_err(|e| Problem::failed("KGM-VMX-0001", title(), e))?;
        let snapshots: Vec<String> = vmsd
            .records
            .iter()
            .map(|r| format!("uid {} \"{}\" parent {:?}", r.uid.unwrap_or(0), r.display_name, r.parent))
            .collect();
        return Ok(Some(json!({
            "file": path,
            "is": "snapshot catalogue",
            "holds": snapshots,
            "differences": vmsd.differences.iter().map(ToString::to_string).collect::<Vec<_>>(),
        })));
    }
    Ok(None)
}

fn redo(name: &str, size: u64, head: &[u8]) -> Value {
    use vmdisk::redo::format::Header;
    let found = <Header as zerocopy::FromBytes>::read_from_prefix(head);
    let mut row = json!({"file": name, "is": "redo log (COWD)"});
    match found
        .map_err(|_| "too short for its header".to_owned())
        .and_then(|(header, _)| header.check(size / block::SECTOR_BYTES).map_err(|e| e.to_string()))
    {
        Ok(header) => {
            row["size_bytes"] = json!(header.capacity * block::SECTOR_BYTES);
            row["grain_bytes"] = json!(header.grain * block::SECTOR_BYTES);
            row["dirty"] = json!(header.dirty);
        }
        Err(why) => row["trouble"] = json!(why),
    }
    row
}
