//! Each noun's verbs, as requests to the daemon.

use std::path::{Path, PathBuf};

use hyper::Method;
use serde_json::{Value, json};

use super::args::{
    Answer, CloneVerb, DatastoreVerb, DiskVerb, ExportVerb, Global, GroupVerb, JobVerb, LunVerb, Noun,
    PoolVerb, Provisioning, RdmMode, RdmVerb, SnapVerb, Via, VmVerb,
};
use super::{Session, columns, segment};
use crate::names::SnapName;
use crate::problem::{Kind, Outcome, Problem};
use crate::units::{parse_disk_size, parse_duration, parse_size};

/// LUN sizes are whole blocks.
const LUN_UNIT: u64 = 4096;
/// Disk sizes are whole sectors.
const DISK_UNIT: u64 = 512;

/// Runs one command.
pub async fn run(global: &Global, noun: &Noun) -> Outcome<u8> {
    let session = || Session::open(global);
    match noun {
        Noun::Pool(verb) => return pool(&session()?, verb).await,
        Noun::Lun(verb) => lun(&session()?, verb).await?,
        Noun::Snap(verb) => snap(&session()?, verb).await?,
        Noun::Clone(CloneVerb::Create { snap, name }) => {
            let body = json!({"snap": snap, "name": name});
            session()?.change_and_print(Method::POST, "/api/v1/clones", Some(body), columns::LUN).await?;
        }
        Noun::Group(verb) => group(&session()?, verb).await?,
        Noun::Datastore(verb) => return datastore(&session()?, verb).await,
        Noun::Disk(verb) => disk(&session()?, verb).await?,
        Noun::Rdm(verb) => rdm(&session()?, verb).await?,
        Noun::Vm(verb) => vm(&session()?, verb).await?,
        Noun::Export(verb) => export(&session()?, verb).await?,
        Noun::Job(verb) => job(&session()?, verb).await?,
        Noun::Backup(verb) => return super::backups::backup(global, verb).await,
        Noun::Restore(args) => super::backups::restore(global, args).await?,
        Noun::Vmkfstools(args) => {
            let noun = super::old_names::vmkfstools(args)?;
            return Box::pin(run(global, &noun)).await;
        }
        Noun::Vmsnap(args) => return super::backups::vmsnap(global, args).await,
        Noun::Quickstart(args) => crate::quickstart::run(global, args).await?,
        // Done before there is a runtime.
        Noun::Vmfs(_) | Noun::Vmdk(_) | Noun::Inspect(_) | Noun::QuickstartWriter(_) => {}
        Noun::Completions { .. } | Noun::Man { .. } | Noun::Serve(_) | Noun::Config(_) => {}
    }
    Ok(0)
}

/// Paths go to the daemon absolute: it has another current directory.
pub fn absolute(path: &Path) -> Outcome<PathBuf> {
    std::path::absolute(path)
        .map_err(|e| Problem::failed("KGM-CLI-0004", format!("cannot use {}", path.display()), e))
}

fn all_absolute(paths: &[PathBuf]) -> Outcome<Vec<PathBuf>> {
    paths.iter().map(|p| absolute(p)).collect()
}

fn usage(error: impl std::fmt::Display) -> Problem {
    Problem::usage(error.to_string())
}

/// A size that is there, as bytes for the body.
fn disk_size(text: Option<&str>, unit: u64) -> Outcome<Option<u64>> {
    text.map(|t| parse_disk_size(t, unit).map_err(usage)).transpose()
}

/// Prints a check's findings; its exit code.
fn verdict(session: &Session, check: &Value) -> Outcome<u8> {
    const COLUMNS: &[crate::output::Column] = &[
        crate::output::col("name", "name", crate::output::Show::Text),
        crate::output::col("verdict", "verdict", crate::output::Show::Text),
        crate::output::col("findings", "findings", crate::output::Show::Text),
        crate::output::col("repaired", "repaired", crate::output::Show::Text),
    ];
    session.print(check, COLUMNS)?;
    Ok(match check.get("verdict").and_then(Value::as_str) {
        Some("clean") => 0,
        Some("leaks") => 3,
        _ => 2,
    })
}

async fn pool(session: &Session, verb: &PoolVerb) -> Outcome<u8> {
    match verb {
        PoolVerb::Create { name, media, size, if_not_exists } => {
            let size = size.as_deref().map(parse_size).transpose().map_err(usage)?;
            let body = json!({"name": name, "media": all_absolute(media)?, "size_bytes": size,
                "if_not_exists": if_not_exists});
            session.change_and_print(Method::POST, "/api/v1/pools", Some(body), columns::POOL).await?;
        }
        PoolVerb::Ls => session.list("/api/v1/pools", columns::POOL).await?,
        PoolVerb::Show { name } => {
            session.show(&format!("/api/v1/pools/{}", segment(name)), columns::POOL).await?
        }
        PoolVerb::Check { name, repair } => {
            // A dry run of a repair is a check.
            let repair = *repair && !session.is_dry_run();
            let path = format!("/api/v1/pools/{}/check?repair={repair}", segment(name));
            let check = session.send(Method::POST, &path, None).await?;
            return verdict(session, &check);
        }
        PoolVerb::Import { media, name } => {
            let body = json!({"media": all_absolute(media)?, "name": name});
            session.change_and_print(Method::POST, "/api/v1/pools/import", Some(body), columns::POOL).await?;
        }
        PoolVerb::Rm { name } => {
            let path = format!("/api/v1/pools/{}", segment(name));
            session.destroy(Method::DELETE, &path, None, "pool", name).await?;
        }
        PoolVerb::Reopen { name } => {
            let path = format!("/api/v1/pools/{}/reopen", segment(name));
            session.change_and_print(Method::POST, &path, None, columns::POOL).await?;
        }
    }
    Ok(0)
}

async fn lun(session: &Session, verb: &LunVerb) -> Outcome {
    let path = |lun: &str| format!("/api/v1/luns/{}", segment(lun));
    match verb {
        LunVerb::Create { name, size, pool, if_not_exists } => {
            let body = json!({"name": name, "size_bytes": disk_size(Some(size), LUN_UNIT)?, "pool": pool,
                "if_not_exists": if_not_exists});
            session.change_and_print(Method::POST, "/api/v1/luns", Some(body), columns::LUN).await
        }
        LunVerb::Ls { trash } => session.list(&format!("/api/v1/luns?trash={trash}"), columns::LUN).await,
        LunVerb::Show { lun } => session.show(&path(lun), columns::LUN).await,
        LunVerb::Resize { lun, size } => {
            let body = json!({"size_bytes": disk_size(Some(size), LUN_UNIT)?});
            session.change_and_print(Method::PATCH, &path(lun), Some(body), columns::LUN).await
        }
        LunVerb::Rm { lun, now } => {
            session.destroy(Method::DELETE, &format!("{}?all={now}", path(lun)), None, "lun", lun).await
        }
        LunVerb::UndoRevert { lun } => {
            session.destroy(Method::POST, &format!("{}/undo-revert", path(lun)), None, "lun", lun).await
        }
        LunVerb::Release { lun, holder } => {
            let body = Some(json!({"holder": holder}));
            session.destroy(Method::POST, &format!("{}/release", path(lun)), body, "lun", lun).await
        }
        LunVerb::Undelete { lun } => {
            let path = format!("{}/undelete", path(lun));
            session.change_and_print(Method::POST, &path, None, columns::LUN).await
        }
    }
}

async fn snap(session: &Session, verb: &SnapVerb) -> Outcome {
    let path = |snap: &str| format!("/api/v1/snaps/{}", segment(snap));
    match verb {
        SnapVerb::Create { snap } => {
            let name = SnapName::parse(snap)?;
            let body = json!({"lun": name.of, "name": name.snap});
            session.change_and_print(Method::POST, "/api/v1/snaps", Some(body), columns::SNAP).await
        }
        SnapVerb::Ls { lun } => {
            let query = lun.as_ref().map_or(String::new(), |l| format!("?lun={}", segment(l)));
            session.list(&format!("/api/v1/snaps{query}"), columns::SNAP).await
        }
        SnapVerb::Rm { snap } => {
            SnapName::parse(snap)?;
            session.destroy(Method::DELETE, &path(snap), None, "snapshot", snap).await
        }
        SnapVerb::Revert { snap, accept } => {
            SnapName::parse(snap)?;
            let body = Some(json!({"accept": accept}));
            session.destroy(Method::POST, &format!("{}/revert", path(snap)), body, "snapshot", snap).await
        }
    }
}

async fn group(session: &Session, verb: &GroupVerb) -> Outcome {
    match verb {
        GroupVerb::Create { name, luns } => {
            let body = json!({"name": name, "luns": luns});
            session.change_and_print(Method::POST, "/api/v1/groups", Some(body), columns::GROUP).await
        }
        GroupVerb::Ls => session.list("/api/v1/groups", columns::GROUP).await,
        GroupVerb::Resolve { group, happened } => {
            let happened = happened.map(|answer| answer == Answer::Yes);
            let body = Some(json!({"group": group, "happened": happened}));
            let name = group.as_deref().unwrap_or("all");
            session.destroy(Method::POST, "/api/v1/groups/resolve", body, "cut", name).await
        }
    }
}

async fn datastore(session: &Session, verb: &DatastoreVerb) -> Outcome<u8> {
    match verb {
        DatastoreVerb::Create { name, lun, size, pool, if_not_exists } => {
            let size = disk_size(size.as_deref(), LUN_UNIT)?;
            let body = json!({"name": name, "lun": lun, "size_bytes": size, "pool": pool,
                "if_not_exists": if_not_exists});
            let path = "/api/v1/datastores";
            if let Some((_, made)) =
                session.confirmed(Method::POST, path, Some(body), "datastore", name).await?
            {
                session.print(&made, columns::DATASTORE)?;
            }
        }
        DatastoreVerb::Ls => session.list("/api/v1/datastores", columns::DATASTORE).await?,
        DatastoreVerb::Show { name } => {
            session.show(&format!("/api/v1/datastores/{}", segment(name)), columns::DATASTORE).await?;
        }
        DatastoreVerb::Attach { lun, name } => {
            let body = Some(json!({"lun": lun, "name": name}));
            let path = "/api/v1/datastores/attach";
            session.change_and_print(Method::POST, path, body, columns::DATASTORE).await?;
        }
        DatastoreVerb::Rm { name, lun } => {
            let path = format!("/api/v1/datastores/{}?all={lun}", segment(name));
            session.destroy(Method::DELETE, &path, None, "datastore", name).await?;
        }
        DatastoreVerb::Check { name } => {
            let path = format!("/api/v1/datastores/{}/check", segment(name));
            let check = session.send(Method::POST, &path, None).await?;
            return verdict(session, &check);
        }
    }
    Ok(0)
}

async fn disk(session: &Session, verb: &DiskVerb) -> Outcome {
    let path = |disk: &str| format!("/api/v1/disks/{}", segment(disk));
    match verb {
        DiskVerb::Create { disk, size, provisioning } => {
            let provisioning = match provisioning {
                Provisioning::Thin => "thin",
                Provisioning::Thick => "thick",
                Provisioning::Eager => "eager",
            };
            let body = json!({"disk": disk, "size_bytes": disk_size(Some(size), DISK_UNIT)?,
                "provisioning": provisioning});
            session.change_and_print(Method::POST, "/api/v1/disks", Some(body), columns::DISK).await
        }
        DiskVerb::Ls { datastore } => {
            let query = datastore.as_ref().map_or(String::new(), |d| format!("?datastore={}", segment(d)));
            session.list(&format!("/api/v1/disks{query}"), columns::DISK).await
        }
        DiskVerb::Show { disk } => session.show(&path(disk), columns::DISK).await,
        DiskVerb::Repair { disk, reason, backup, repo, backup_disk } => {
            let repo = repo.as_ref().map(|repo| absolute(repo)).transpose()?;
            let body = json!({"reason": reason, "backup": backup, "repo": repo, "backup_disk": backup_disk});
            let path = format!("{}/repair", path(disk));
            match session.confirmed(Method::POST, &path, Some(body), "disk", disk).await? {
                Some((_, chain)) => session.print(&chain, columns::REPAIR),
                None => Ok(()),
            }
        }
        DiskVerb::Rm { disk } => session.destroy(Method::DELETE, &path(disk), None, "disk", disk).await,
    }
}

fn mode_name(mode: RdmMode) -> &'static str {
    match mode {
        RdmMode::Virtual => "virtual",
        RdmMode::Physical => "physical",
    }
}

async fn rdm(session: &Session, verb: &RdmVerb) -> Outcome {
    let path = |disk: &str, action: &str| format!("/api/v1/rdms/{}{action}", segment(disk));
    match verb {
        RdmVerb::Create { disk, lun, mode } => {
            let body = json!({"disk": disk, "lun": lun, "mode": mode_name(*mode)});
            session.change_and_print(Method::POST, "/api/v1/rdms", Some(body), columns::RDM).await
        }
        RdmVerb::Ls => session.list("/api/v1/rdms", columns::RDM).await,
        RdmVerb::Show { disk } => session.show(&path(disk, ""), columns::RDM).await,
        RdmVerb::Grow { disk } => {
            session.change_and_print(Method::POST, &path(disk, "/grow"), None, columns::RDM).await
        }
        RdmVerb::Remap { disk, to } => {
            let body = Some(json!({"to": to}));
            let path = path(disk, "/remap");
            match session.confirmed(Method::POST, &path, body, "mapping", disk).await? {
                Some((_, mapping)) => session.print(&mapping, columns::RDM),
                None => Ok(()),
            }
        }
        RdmVerb::Scan { rebuild } => {
            const COLUMNS: &[crate::output::Column] = &[
                crate::output::col("findings", "findings", crate::output::Show::Text),
                crate::output::col("rebuilt", "rebuilt", crate::output::Show::Text),
            ];
            let dry = !rebuild || session.is_dry_run();
            let scan = session.send(Method::POST, &format!("/api/v1/rdms/scan?dry_run={dry}"), None).await?;
            session.print(&scan, COLUMNS)
        }
        RdmVerb::Convert { disk, mode } => {
            let body = json!({"mode": mode_name(*mode)});
            session.change_and_print(Method::POST, &path(disk, "/convert"), Some(body), columns::RDM).await
        }
    }
}

/// `LUN` or `LUN:physical`.
fn vm_rdm(text: &str) -> Outcome<Value> {
    let (lun, mode) = text.rsplit_once(':').unwrap_or((text, "virtual"));
    if !matches!(mode, "virtual" | "physical") {
        return Err(
            Problem::usage(format!("\"{mode}\" is no mode of a mapping")).hint("LUN:virtual or LUN:physical")
        );
    }
    Ok(json!({"lun": lun, "mode": mode}))
}

async fn vm(session: &Session, verb: &VmVerb) -> Outcome {
    let path = |name: &str, action: &str| format!("/api/v1/vms/{}{action}", segment(name));
    match verb {
        VmVerb::Create { name, datastore, disk, rdm, memory } => {
            let sizes = disk.iter().map(|s| parse_disk_size(s, DISK_UNIT).map_err(usage));
            let body = json!({
                "name": name,
                "datastore": datastore,
                "disks": sizes.collect::<Outcome<Vec<u64>>>()?,
                "rdms": rdm.iter().map(|r| vm_rdm(r)).collect::<Outcome<Vec<Value>>>()?,
                "memory_mib": parse_size(memory).map_err(usage)? >> 20,
            });
            match session.change(Method::POST, "/api/v1/vms", Some(body)).await? {
                Some(vm) => print_vm(session, &vm),
                None => Ok(()),
            }
        }
        VmVerb::Register { vmx, name } => {
            let body = json!({"vmx": vmx, "name": name});
            session.change_and_print(Method::POST, "/api/v1/vms/register", Some(body), columns::VM).await
        }
        VmVerb::Ls => session.list("/api/v1/vms", columns::VM).await,
        VmVerb::Show { name } => print_vm(session, &session.get(&path(name, "")).await?),
        VmVerb::Attach { name, disk, slot, mode } => {
            let body = json!({"disk": disk, "slot": slot, "mode": mode});
            session.change_and_print(Method::POST, &path(name, "/attach"), Some(body), columns::VM).await
        }
        VmVerb::Detach { name, slot } => {
            let body = json!({"slot": slot});
            session.change_and_print(Method::POST, &path(name, "/detach"), Some(body), columns::VM).await
        }
        VmVerb::Rm { name, files } => {
            session.destroy(Method::DELETE, &path(name, &format!("?all={files}")), None, "vm", name).await
        }
    }
}

/// A VM, and for people its disks in a table below.
fn print_vm(session: &Session, vm: &Value) -> Outcome {
    session.print(vm, columns::VM)?;
    if session.for_people()
        && let Some(disks) = vm.get("disks").filter(|d| d.as_array().is_some_and(|d| !d.is_empty()))
    {
        println!();
        session.print_list(disks, columns::VM_DISK)?;
    }
    Ok(())
}

async fn export(session: &Session, verb: &ExportVerb) -> Outcome {
    match verb {
        ExportVerb::Start { target, name, read_only, protocol, shared, initiator, iqn, chap } => {
            let chap = chap.as_deref().map(chap_file).transpose()?;
            let body = json!({
                "target": target, "name": name, "read_only": read_only, "protocol": protocol, "shared": shared,
                "initiators": initiator, "iqn": iqn, "chap": chap,
            });
            session.change_and_print(Method::POST, "/api/v1/exports", Some(body), columns::EXPORT).await
        }
        ExportVerb::Stop { name } => {
            let path = format!("/api/v1/exports/{}", segment(name));
            session.destroy(Method::DELETE, &path, None, "export", name).await
        }
        ExportVerb::Ls => session.list("/api/v1/exports", columns::EXPORT).await,
    }
}

/// Names and secrets for CHAP: a line for initiators, a second one for the target.
fn chap_file(file: &std::path::Path) -> Outcome<crate::model::NewChap> {
    let shown = file.display();
    let text = std::fs::read_to_string(file)
        .map_err(|e| Problem::new("KGM-CLI-0016", Kind::NotFound, format!("cannot read {shown}")).why(e))?;
    let mut lines = text.lines().filter(|line| !line.trim().is_empty()).map(|line| {
        let pair = line.trim().split_once(char::is_whitespace);
        pair.map(|(name, secret)| (name.to_owned(), secret.trim().to_owned()))
    });
    let wrong = || Problem::usage(format!("{shown} has no line \"NAME SECRET\", or more than two lines"));
    let (user, secret) = lines.next().flatten().ok_or_else(wrong)?;
    let target = lines.next().map(|line| line.ok_or_else(wrong)).transpose()?;
    if lines.next().is_some() {
        return Err(wrong());
    }
    let (target_user, target_secret) = target.unzip();
    Ok(crate::model::NewChap { user, secret, target_user, target_secret })
}

async fn job(session: &Session, verb: &JobVerb) -> Outcome {
    let path = |id: &str| format!("/api/v1/jobs/{}", segment(id));
    match verb {
        JobVerb::Ls => session.list("/api/v1/jobs", columns::JOB).await,
        JobVerb::Show { id } => session.show(&path(id), columns::JOB).await,
        JobVerb::Wait { id, timeout } => {
            let waited = match timeout {
                None => session.follow(id).await,
                Some(text) => {
                    let time = parse_duration(text).map_err(usage)?;
                    tokio::time::timeout(time, session.follow(id)).await.unwrap_or_else(|_| {
                        Err(Problem::new(
                            "KGM-JOB-0005",
                            Kind::Failed,
                            format!("job {id} has not ended in {text}"),
                        )
                        .hint(format!("kagami job cancel {id}")))
                    })
                }
            };
            session.show(&path(id), columns::JOB).await?;
            waited.map(drop)
        }
        JobVerb::Cancel { id } => {
            if session.is_dry_run() {
                return Err(Problem::new("KGM-CLI-0017", Kind::Usage, "cancel has no dry run"));
            }
            let job = session.send(Method::POST, &format!("{}/cancel", path(id)), None).await?;
            session.print(&job, columns::JOB)
        }
    }
}

/// The name of a `--via`.
pub fn via_name(via: Via) -> &'static str {
    match via {
        Via::Redo => "redo",
        Via::Snapshot => "snapshot",
    }
}
