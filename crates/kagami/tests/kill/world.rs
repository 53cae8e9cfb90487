//! What a home must hold after a list of requests, and the requests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use fastrand::Rng;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A LUN, living or in the trash.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lun {
    pool: &'static str,
    size: u64,
    snaps: BTreeMap<String, u64>,
    /// Its size before it was reverted.
    abandoned: Option<u64>,
    claim: Option<String>,
}

impl Lun {
    fn new(pool: &'static str, size: u64) -> Self {
        Self { pool, size, snaps: BTreeMap::new(), abandoned: None, claim: None }
    }
}

/// A descriptor with its extent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disk {
    size: u64,
    kind: &'static str,
    /// How the extent's name ends: as it was made.
    extent: &'static str,
    lun: Option<String>,
}

/// Everything in the home, and on the media that were taken out of it.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct World {
    pools: BTreeSet<&'static str>,
    luns: BTreeMap<String, Lun>,
    trash: BTreeMap<String, Lun>,
    /// Name and LUN.
    stores: BTreeMap<String, String>,
    /// By `DATASTORE:DIR/NAME.vmdk`.
    disks: BTreeMap<String, Disk>,
    /// Disks in the order of slots.
    vms: BTreeMap<String, Vec<String>>,
    /// VMs that were unregistered; their files are there.
    left: BTreeMap<String, Vec<String>>,
    /// The file of pool p3 is there.
    p3_file: bool,
    /// Backups of sql01, at least and at most.
    pub backups: (u64, u64),
}

/// A request.
#[derive(Clone, Debug)]
pub enum Op {
    CreateLun { name: String },
    Resize { name: String, size: u64 },
    RemoveLun { name: String, now: bool },
    EmptyTrash { name: String },
    Undelete { name: String },
    Snap { lun: String, snap: String },
    RemoveSnap { lun: String, snap: String },
    Revert { lun: String, snap: String },
    Accept { lun: String, snap: String },
    UndoRevert { lun: String },
    Clone { lun: String, snap: String, name: String },
    Group { luns: Vec<String>, snap: String },
    CreateStore,
    RemoveStore,
    CreateDisk { path: String, provisioning: &'static str },
    RemoveDisk { path: String },
    CreateRdm { path: String, lun: String, mode: &'static str },
    Convert { path: String, mode: &'static str },
    Grow { path: String },
    CreateVm { name: String, lun: Option<String> },
    RemoveVm { name: String, files: bool },
    Register { name: String },
    PoolOut { name: &'static str },
    PoolIn { name: &'static str },
    CreatePool,
    RemovePoolFile,
    Backup { via: &'static str },
    RestoreAs { name: String },
    RestoreToLun { name: String },
    RestoreInPlace,
    Prune,
}

/// What is done by one of these is a job, by the others an answer.
impl Op {
    pub fn is_job(&self) -> bool {
        use Op::{Backup, RestoreAs, RestoreInPlace, RestoreToLun};
        matches!(self, Backup { .. } | RestoreAs { .. } | RestoreToLun { .. } | RestoreInPlace)
    }

    /// Method, path and body; nothing for what is done without the daemon.
    pub fn request(&self, dir: &Path) -> Option<(&'static str, String, Value)> {
        let seg = |text: &str| text.replace(':', "%3A").replace('/', "%2F");
        let file = |name: &str| dir.join(name).display().to_string();
        let lun_path = |lun: &str| format!("/api/v1/luns/{lun}");
        let snap_path = |lun: &str, snap: &str| format!("/api/v1/snaps/{lun}@{snap}");
        let none = Value::Null;
        Some(match self {
            Op::CreateLun { name } => {
                ("POST", "/api/v1/luns".into(), json!({"name": name, "size_bytes": 4 * MIB, "pool": "p1"}))
            }
            Op::Resize { name, size } => ("PATCH", lun_path(name), json!({"size_bytes": size})),
            Op::RemoveLun { name, now } => ("DELETE", format!("{}?all={now}", lun_path(name)), none),
            Op::EmptyTrash { name } => ("DELETE", format!("{}?all=true", lun_path(name)), none),
            Op::Undelete { name } => ("POST", format!("{}/undelete", lun_path(name)), none),
            Op::Snap { lun, snap } => ("POST", "/api/v1/snaps".into(), json!({"lun": lun, "name": snap})),
            Op::RemoveSnap { lun, snap } => ("DELETE", snap_path(lun, snap), none),
            Op::Revert { lun, snap } => ("POST", format!("{}/revert", snap_path(lun, snap)), json!({})),
            Op::Accept { lun, snap } => {
                ("POST", format!("{}/revert", snap_path(lun, snap)), json!({"accept": true}))
            }
            Op::UndoRevert { lun } => ("POST", format!("{}/undo-revert", lun_path(lun)), none),
            Op::Clone { lun, snap, name } => {
                ("POST", "/api/v1/clones".into(), json!({"snap": format!("{lun}@{snap}"), "name": name}))
            }
            Op::Group { luns, snap } => {
                ("POST", "/api/v1/groups".into(), json!({"name": snap, "luns": luns}))
            }
            Op::CreateStore => (
                "POST",
                "/api/v1/datastores".into(),
                json!({"name": "e0", "size_bytes": 768 * MIB, "pool": "p1"}),
            ),
            Op::RemoveStore => ("DELETE", "/api/v1/datastores/e0?all=true".into(), none),
            Op::CreateDisk { path, provisioning } => (
                "POST",
                "/api/v1/disks".into(),
                json!({"disk": path, "size_bytes": 2 * MIB, "provisioning": provisioning}),
            ),
            Op::RemoveDisk { path } => ("DELETE", format!("/api/v1/disks/{}", seg(path)), none),
            Op::CreateRdm { path, lun, mode } => {
                ("POST", "/api/v1/rdms".into(), json!({"disk": path, "lun": lun, "mode": mode}))
            }
            Op::Convert { path, mode } => {
                ("POST", format!("/api/v1/rdms/{}/convert", seg(path)), json!({"mode": mode}))
            }
            Op::Grow { path } => ("POST", format!("/api/v1/rdms/{}/grow", seg(path)), none),
            Op::CreateVm { name, lun } => {
                let rdms: Vec<Value> = lun.iter().map(|l| json!({"lun": l, "mode": "virtual"})).collect();
                let new = json!({"name": name, "datastore": "ds1", "disks": [2 * MIB], "rdms": rdms,
                    "memory_mib": 64});
                ("POST", "/api/v1/vms".into(), new)
            }
            Op::RemoveVm { name, files } => ("DELETE", format!("/api/v1/vms/{name}?all={files}"), none),
            Op::Register { name } => {
                ("POST", "/api/v1/vms/register".into(), json!({"vmx": format!("ds1:{name}/{name}.vmx")}))
            }
            Op::PoolOut { name } => ("DELETE", format!("/api/v1/pools/{name}"), none),
            Op::PoolIn { name } => {
                ("POST", "/api/v1/pools/import".into(), json!({"media": [file(&format!("{name}.pool"))]}))
            }
            Op::CreatePool => (
                "POST",
                "/api/v1/pools".into(),
                json!({"name": "p3", "media": [file("p3.pool")], "size_bytes": 64 * MIB}),
            ),
            Op::Backup { via } => (
                "POST",
                "/api/v1/backups".into(),
                json!({"vm": "sql01", "repo": file("repo"), "via": via, "limit_bytes_per_second": 32 * MIB}),
            ),
            Op::RestoreAs { name } => (
                "POST",
                "/api/v1/restores".into(),
                json!({"backup": "sql01", "repo": file("repo"), "new_vm": name, "pool": "p1"}),
            ),
            Op::RestoreToLun { name } => (
                "POST",
                "/api/v1/restores".into(),
                json!({"backup": "sql01", "repo": file("repo"), "new_lun": name, "disk": "scsi0:1",
                    "pool": "p1"}),
            ),
            Op::RestoreInPlace => (
                "POST",
                "/api/v1/restores".into(),
                json!({"backup": "off1", "repo": file("repo-off"), "in_place": true}),
            ),
            Op::RemovePoolFile | Op::Prune => return None,
        })
    }
}

fn any<T>(random: &mut Rng, of: Vec<T>) -> Option<T> {
    if of.is_empty() { None } else { Some(random.usize(0..of.len())).and_then(|i| of.into_iter().nth(i)) }
}

impl World {
    /// What the test makes before the first kill.
    pub fn at_first() -> Self {
        let mut world = Self { backups: (1, 1), ..Self::default() };
        world.pools.insert("p1");
        world.add_store("ds1", "p1");
        for (vm, lun, c, d) in [("sql01", "w-d", 8, 4), ("off1", "off-d", 4, 4)] {
            world.add_vm("ds1", "p1", vm, lun, c * MIB, d * MIB);
        }
        world.add_p2();
        world
    }

    fn add_p2(&mut self) {
        self.pools.insert("p2");
        self.add_store("ds2", "p2");
        self.add_vm("ds2", "p2", "guest2", "g-d", 2 * MIB, 4 * MIB);
    }

    fn add_store(&mut self, name: &str, pool: &'static str) {
        let size = if name == "e0" { 768 * MIB } else { 1024 * MIB };
        let lun = Lun { claim: Some(format!("datastore {name}")), ..Lun::new(pool, size) };
        self.luns.insert(name.into(), lun);
        self.stores.insert(name.into(), name.into());
    }

    fn add_vm(&mut self, store: &str, pool: &'static str, vm: &str, lun: &str, c: u64, d: u64) {
        let flat = Disk { size: c, kind: "thin", extent: "-flat", lun: None };
        let (first, second) = (format!("{store}:{vm}/{vm}.vmdk"), format!("{store}:{vm}/{vm}_1.vmdk"));
        self.disks.insert(first.clone(), flat);
        self.luns.insert(lun.into(), Lun::new(pool, d));
        self.map(&second, lun, "physical");
        self.vms.insert(vm.into(), vec![first, second]);
    }

    fn map(&mut self, path: &str, lun: &str, mode: &str) {
        let (kind, extent) = if mode == "virtual" { ("rdm", "-rdm") } else { ("rdmp", "-rdmp") };
        let (store, rest) = path.split_once(':').unwrap();
        let found = self.luns.get_mut(lun).unwrap();
        found.claim = Some(format!("the mapping [{store}] /{rest}"));
        let disk = Disk { size: found.size, kind, extent, lun: Some(lun.into()) };
        self.disks.insert(path.into(), disk);
    }

    fn unmap(&mut self, path: &str) {
        let disk = self.disks.remove(path).unwrap();
        if let Some(lun) = disk.lun {
            self.luns.get_mut(&lun).unwrap().claim = None;
        }
    }

    /// LUNs of the test that fit.
    fn luns_that(&self, fit: impl Fn(&str, &Lun) -> bool) -> Vec<String> {
        let ours = |n: &str| n.starts_with('t') || n.starts_with('r');
        self.luns.iter().filter(|(n, l)| ours(n) && fit(n, l)).map(|(n, _)| n.clone()).collect()
    }

    fn disks_that(&self, fit: impl Fn(&str, &Disk) -> bool) -> Vec<String> {
        self.disks.iter().filter(|(n, d)| fit(n, d)).map(|(n, _)| n.clone()).collect()
    }

    fn is_free(_: &str, lun: &Lun) -> bool {
        lun.claim.is_none() && lun.abandoned.is_none()
    }

    fn names(&self, of: &[&str], taken: impl Fn(&str) -> bool) -> Vec<String> {
        of.iter().filter(|n| !taken(n)).map(|n| (*n).to_owned()).collect()
    }

    /// A request that fits.
    pub fn pick(&self, random: &mut Rng) -> Op {
        loop {
            let kind = random.u32(0..34);
            if let Some(op) = self.of_array(kind, random).or_else(|| self.of_vms(kind, random)) {
                return op;
            }
        }
    }

    fn new_lun(&self, random: &mut Rng) -> Option<String> {
        any(random, self.names(&["t0", "t1", "t2", "t3", "t4", "t5"], |n| self.luns.contains_key(n)))
    }

    fn of_array(&self, kind: u32, random: &mut Rng) -> Option<Op> {
        let snaps = |lun: &str| self.luns[lun].snaps.keys().cloned().collect::<Vec<_>>();
        Some(match kind {
            0 | 1 => Op::CreateLun { name: self.new_lun(random)? },
            2 => {
                let name = any(random, self.luns_that(|_, l| l.abandoned.is_none() && l.size < 32 * MIB))?;
                Op::Resize { size: self.luns[&name].size + 4 * MIB, name }
            }
            3 => {
                let lun = any(random, self.luns_that(|_, l| l.abandoned.is_none()))?;
                let taken = |n: &str| self.luns[&lun].snaps.contains_key(n);
                Op::Snap { snap: any(random, self.names(&["s0", "s1", "s2"], taken))?, lun }
            }
            4 => {
                let lun = any(random, self.luns_that(|_, l| l.abandoned.is_none() && !l.snaps.is_empty()))?;
                Op::RemoveSnap { snap: any(random, snaps(&lun))?, lun }
            }
            5 => {
                let lun = any(random, self.luns_that(|n, l| Self::is_free(n, l) && !l.snaps.is_empty()))?;
                Op::Revert { snap: any(random, snaps(&lun))?, lun }
            }
            6 => {
                let lun = any(random, self.luns_that(|_, l| l.abandoned.is_some()))?;
                match random.bool() {
                    true => Op::Accept { snap: any(random, snaps(&lun))?, lun },
                    false => Op::UndoRevert { lun },
                }
            }
            7 => {
                let lun = any(random, self.luns_that(|_, l| !l.snaps.is_empty()))?;
                Op::Clone { snap: any(random, snaps(&lun))?, name: self.new_lun(random)?, lun }
            }
            8 => {
                let luns = self.luns_that(|_, l| l.abandoned.is_none() && !l.snaps.contains_key("g"));
                if luns.len() < 2 {
                    return None;
                }
                Op::Group { luns, snap: "g".into() }
            }
            9 => {
                let name = any(random, self.luns_that(Self::is_free))?;
                Op::RemoveLun { now: self.trash.contains_key(&name) || random.bool(), name }
            }
            10 => {
                let gone = |n: &&String| !self.luns.contains_key(*n);
                let name = any(random, self.trash.keys().filter(gone).cloned().collect())?;
                let again = name != "e0" && random.bool();
                if again { Op::Undelete { name } } else { Op::EmptyTrash { name } }
            }
            11 | 12 => match (self.stores.contains_key("e0"), self.trash.contains_key("e0")) {
                (true, false) => Op::RemoveStore,
                (false, false) => Op::CreateStore,
                (_, true) => return None,
            },
            13 | 14 => match self.pools.contains("p2") {
                true => Op::PoolOut { name: "p2" },
                false => Op::PoolIn { name: "p2" },
            },
            15 => match (self.pools.contains("p3"), self.p3_file) {
                (true, _) => Op::PoolOut { name: "p3" },
                (false, true) if random.bool() => Op::PoolIn { name: "p3" },
                (false, true) => Op::RemovePoolFile,
                (false, false) => Op::CreatePool,
            },
            _ => return None,
        })
    }

    fn of_vms(&self, kind: u32, random: &mut Rng) -> Option<Op> {
        let modes = ["virtual", "physical"];
        Some(match kind {
            16 | 17 => {
                let all = ["ds1:k/d0.vmdk", "ds1:k/d1.vmdk", "ds1:k/d2.vmdk"];
                let provisioning = ["thin", "thick", "eager"][random.usize(0..3)];
                let path = any(random, self.names(&all, |n| self.disks.contains_key(n)))?;
                Op::CreateDisk { path, provisioning }
            }
            18 | 19 => Op::RemoveDisk { path: any(random, self.disks_that(|n, _| n.contains(":k/")))? },
            20 => {
                let all = ["ds1:k/m0.vmdk", "ds1:k/m1.vmdk"];
                let path = any(random, self.names(&all, |n| self.disks.contains_key(n)))?;
                let lun = any(random, self.luns_that(Self::is_free))?;
                Op::CreateRdm { path, lun, mode: modes[random.usize(0..2)] }
            }
            21 => {
                let path = any(random, self.disks_that(|n, _| n.contains(":k/m")))?;
                let mode = if self.disks[&path].kind == "rdm" { "physical" } else { "virtual" };
                Op::Convert { path, mode }
            }
            22 => {
                let grown = |d: &Disk| d.lun.as_ref().is_some_and(|l| self.luns[l].size > d.size);
                Op::Grow { path: any(random, self.disks_that(|n, d| n.contains(":k/m") && grown(d)))? }
            }
            23 | 24 => {
                let taken = |n: &str| self.vms.contains_key(n) || self.left.contains_key(n);
                let lun = if random.bool() { any(random, self.luns_that(Self::is_free)) } else { None };
                Op::CreateVm { name: any(random, self.names(&["v0", "v1"], taken))?, lun }
            }
            25 | 26 => {
                let ours = |n: &&String| n.starts_with('v') || n.starts_with('r');
                let name = any(random, self.vms.keys().filter(ours).cloned().collect())?;
                Op::RemoveVm { name, files: random.u32(0..3) > 0 }
            }
            27 => Op::Register { name: any(random, self.left.keys().cloned().collect())? },
            28 | 29 => Op::Backup { via: ["snapshot", "redo"][random.usize(0..2)] },
            30 => {
                let taken = |n: &str| self.vms.contains_key(n) || self.left.contains_key(n);
                Op::RestoreAs { name: any(random, self.names(&["r0", "r1"], taken))? }
            }
            31 => {
                let taken = |n: &str| self.luns.contains_key(n) || self.trash.contains_key(n);
                Op::RestoreToLun { name: any(random, self.names(&["rl0", "rl1"], taken))? }
            }
            32 => Op::RestoreInPlace,
            33 => Op::Prune,
            _ => return None,
        })
    }

    /// The request was done.
    pub fn apply(&mut self, op: &Op) {
        match op.clone() {
            Op::CreateLun { name } => drop(self.luns.insert(name, Lun::new("p1", 4 * MIB))),
            Op::Resize { name, size } => self.luns.get_mut(&name).unwrap().size = size,
            Op::RemoveLun { name, now } => {
                let lun = self.luns.remove(&name).unwrap();
                if !now {
                    self.trash.insert(name, lun);
                }
            }
            Op::EmptyTrash { name } => drop(self.trash.remove(&name)),
            Op::Undelete { name } => {
                let lun = self.trash.remove(&name).unwrap();
                self.luns.insert(name, lun);
            }
            Op::Snap { lun, snap } => self.snap(&lun, snap),
            Op::Group { luns, snap } => luns.iter().for_each(|lun| self.snap(lun, snap.clone())),
            Op::RemoveSnap { lun, snap } => drop(self.luns.get_mut(&lun).unwrap().snaps.remove(&snap)),
            Op::Revert { lun, snap } => {
                let lun = self.luns.get_mut(&lun).unwrap();
                (lun.abandoned, lun.size) = (Some(lun.size), lun.snaps[&snap]);
            }
            Op::Accept { lun, .. } => self.luns.get_mut(&lun).unwrap().abandoned = None,
            Op::UndoRevert { lun } => {
                let lun = self.luns.get_mut(&lun).unwrap();
                lun.size = lun.abandoned.take().unwrap();
            }
            Op::Clone { lun, snap, name } => {
                let size = self.luns[&lun].snaps[&snap];
                self.luns.insert(name, Lun::new("p1", size));
            }
            Op::CreateStore => self.add_store("e0", "p1"),
            Op::RemoveStore => {
                self.stores.remove("e0");
                let lun = self.luns.remove("e0").unwrap();
                self.trash.insert("e0".into(), Lun { claim: None, ..lun });
            }
            Op::CreateDisk { path, provisioning } => {
                let kind = if provisioning == "thin" { "thin" } else { "thick" };
                self.disks.insert(path, Disk { size: 2 * MIB, kind, extent: "-flat", lun: None });
            }
            Op::RemoveDisk { path } => self.unmap(&path),
            Op::CreateRdm { path, lun, mode } => self.map(&path, &lun, mode),
            Op::Convert { path, mode } => {
                self.disks.get_mut(&path).unwrap().kind = if mode == "virtual" { "rdm" } else { "rdmp" };
            }
            Op::Grow { path } => {
                let disk = self.disks.get_mut(&path).unwrap();
                disk.size = self.luns[disk.lun.as_ref().unwrap()].size;
            }
            Op::CreateVm { name, lun } => {
                let first = format!("ds1:{name}/{name}.vmdk");
                let flat = Disk { size: 2 * MIB, kind: "thin", extent: "-flat", lun: None };
                self.disks.insert(first.clone(), flat);
                let mut disks = vec![first];
                if let Some(lun) = lun {
                    let second = format!("ds1:{name}/{name}_1.vmdk");
                    self.map(&second, &lun, "virtual");
                    disks.push(second);
                }
                self.vms.insert(name, disks);
            }
            Op::RemoveVm { name, files } => {
                let disks = self.vms.remove(&name).unwrap();
                match files {
                    true => disks.iter().for_each(|disk| self.unmap(disk)),
                    false => drop(self.left.insert(name, disks)),
                }
            }
            Op::Register { name } => {
                let disks = self.left.remove(&name).unwrap();
                self.vms.insert(name, disks);
            }
            Op::PoolOut { name: "p2" } => {
                self.pools.remove("p2");
                self.luns.retain(|_, l| l.pool != "p2");
                self.disks.retain(|n, _| !n.starts_with("ds2:"));
                self.stores.remove("ds2");
                self.vms.remove("guest2");
            }
            Op::PoolIn { name: "p2" } => self.add_p2(),
            Op::PoolOut { name } => drop(self.pools.remove(name)),
            Op::PoolIn { name } => drop(self.pools.insert(name)),
            Op::CreatePool => {
                self.pools.insert("p3");
                self.p3_file = true;
            }
            Op::RemovePoolFile => self.p3_file = false,
            Op::Backup { .. } => self.backups = (self.backups.0 + 1, self.backups.1 + 1),
            Op::RestoreAs { name } => {
                // A LUN's name that is taken gets a number.
                let free = |n: &String| !self.luns.contains_key(n);
                let stem = format!("{name}-scsi0-1");
                let lun =
                    (0..9).map(|n| if n == 0 { stem.clone() } else { format!("{stem}-{n}") }).find(free);
                self.add_vm("ds1", "p1", &name, &lun.unwrap(), 8 * MIB, 4 * MIB);
            }
            Op::RestoreToLun { name } => drop(self.luns.insert(name, Lun::new("p1", 4 * MIB))),
            Op::RestoreInPlace => {}
            Op::Prune => self.backups = (self.backups.0.min(2), self.backups.1.min(2)),
        }
    }

    fn snap(&mut self, lun: &str, snap: String) {
        let lun = self.luns.get_mut(lun).unwrap();
        lun.snaps.insert(snap, lun.size);
    }

    /// Everything that the daemon must show, a line each.
    pub fn facts(&self) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        for pool in &self.pools {
            all.insert(format!("pool {pool} ok"));
        }
        for (name, lun) in &self.luns {
            let claim = lun.claim.as_deref().unwrap_or("nobody");
            let snaps: Vec<&str> = lun.snaps.keys().map(String::as_str).collect();
            all.insert(lun_fact(name, lun.pool, lun.size, claim, lun.abandoned.is_some(), &snaps));
        }
        for (name, lun) in &self.trash {
            all.insert(format!("trash {name} {}", lun.size));
        }
        for (name, lun) in &self.stores {
            all.insert(format!("datastore {name} ok {lun}"));
        }
        for (path, disk) in &self.disks {
            all.insert(format!("disk {path} {} {}", disk.size, disk.kind));
            if let Some(lun) = &disk.lun {
                let mode = if disk.kind == "rdm" { "virtual" } else { "physical" };
                let (state, claim) = match self.luns[lun].size > disk.size {
                    true => ("larger", "differs in length"),
                    false => ("resolved", "ok"),
                };
                all.insert(format!("mapping {path} {mode} {state} {lun} {} ok ok {claim}", disk.size));
            }
        }
        for (name, disks) in &self.vms {
            all.insert(format!("vm {name} ok {}", disks.join(" ")));
        }
        all
    }

    /// Every file that must lie on ds1, without directories.
    pub fn files(&self) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        for (path, disk) in &self.disks {
            if let Some(path) = path.strip_prefix("ds1:") {
                all.insert(format!("/{path}"));
                all.insert(format!("/{}{}.vmdk", path.trim_end_matches(".vmdk"), disk.extent));
            }
        }
        let vms = self.vms.keys().chain(self.left.keys()).filter(|vm| *vm != "guest2");
        all.extend(vms.map(|vm| format!("/{vm}/{vm}.vmx")));
        all
    }
}

/// A LUN as one line.
pub fn lun_fact(name: &str, pool: &str, size: u64, claim: &str, reverted: bool, snaps: &[&str]) -> String {
    let reverted = if reverted { "reverted" } else { "straight" };
    format!("lun {pool}/{name} {size} [{claim}] {reverted} @{}", snaps.join(" @"))
}
