//! Datastores: VMFS on LUNs of the home's pools.

use std::rc::{Rc, Weak};
use std::time::SystemTime;

use array::Claim;
use block::Disk;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vm::{Datastore, Surroundings};
use vmdisk::VmfsFolder;
use vmdisk::rdm::{Around, Facts, Luns, VisibleLun};
use vmfs::{Mode, NewVolume, Volume};

use super::doing::Doing;
use super::luns::{FoundLun, visible_lun};
use super::pools::pool_problem;
use super::{Folder, Store};
use crate::api::Change;
use crate::cli::images::{create_problem, vmfs_problem};
use crate::files::{Named, Versioned};
use crate::model::{CheckView, DatastoreView, NewDatastore, Plan};
use crate::names::FileName;
use crate::problem::{Kind, Outcome, Problem, check_name};
use crate::units::show_size;

/// Smallest VMFS-5, in bytes.
const SMALLEST: u64 = 768 << 20;

/// What the home remembers of a datastore.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DatastoreRecord {
    /// Format of this record.
    pub format: u32,
    /// Name.
    pub name: String,
    /// Its LUN.
    pub lun: Uuid,
}

impl Versioned for DatastoreRecord {
    const FORMAT: u32 = 1;
}

impl Named for DatastoreRecord {
    fn format(&self) -> u32 {
        self.format
    }

    fn unknown(name: String, format: u32) -> Self {
        Self { format, name, lun: Uuid::nil() }
    }
}

/// What a new datastore goes on.
enum On {
    /// A LUN that is there.
    Lun(FoundLun),
    /// One that is made for it.
    New { pool_name: String, pool: super::pools::OpenPool, size: u64 },
}

/// A datastore of the home, open or not.
pub struct DatastoreEntry {
    pub(super) record: DatastoreRecord,
    pub(super) state: Result<Rc<Datastore>, Problem>,
}

impl Luns for Store {
    fn visible(&self) -> Vec<VisibleLun> {
        self.all_luns().iter().map(|f| visible_lun(&f.lun)).collect()
    }

    fn watch(&self) -> Option<Rc<dyn Luns>> {
        Some(Rc::new(Watch(Weak::clone(&self.this))))
    }
}

/// The home's LUNs for a disk that waits for one: the home has its disks, not the other way round.
struct Watch(Weak<Store>);

impl Luns for Watch {
    fn visible(&self) -> Vec<VisibleLun> {
        self.0.upgrade().map_or_else(Vec::new, |store| store.visible())
    }
}

impl Surroundings for Store {
    fn datastore(&self, name: &str) -> Option<Rc<Datastore>> {
        use vmdisk::folder::Folder as _;
        let datastores = self.datastores.borrow();
        let open = |e: &DatastoreEntry| e.state.as_ref().ok().cloned();
        datastores
            .get(name)
            .and_then(open)
            .or_else(|| datastores.values().filter_map(open).find(|d| d.folder.is_named(name)))
    }
}

impl Store {
    async fn open_datastore(&self, record: &DatastoreRecord) -> Outcome<Rc<Datastore>> {
        self.known(Folder::Datastores, &record.name, record)?;
        let found = self.lun(&record.lun.to_string()).map_err(|_| {
            Problem::new("KGM-DST-0001", Kind::NotFound, format!("datastore \"{}\" is missing", record.name))
                .why(format!("its LUN {} is in no open pool", record.lun))
                .hint("kagami pool ls")
        })?;
        self.open_volume(&record.name, &found).await
    }

    pub(super) async fn open_volume(&self, name: &str, found: &FoundLun) -> Outcome<Rc<Datastore>> {
        let device = Rc::clone(&found.lun) as Rc<dyn Disk>;
        let volume = Volume::open(vec![device], Mode::Write)
            .await
            .map_err(|e| vmfs_problem(format!("datastore \"{name}\" cannot be opened"), &e))?;
        if let Some(leaks) = volume.leaks_repaired() {
            tracing::warn!(datastore = name, leaks, "it was not closed: checked, and leaks given back");
        }
        Ok(Rc::new(Datastore {
            name: name.to_owned(),
            folder: VmfsFolder::new(volume.clone()),
            volume,
            lun: Rc::clone(&found.lun),
            pool: Rc::clone(&found.pool.pool),
        }))
    }

    pub(super) async fn open_datastores(&self) -> Outcome {
        for record in self.load::<DatastoreRecord>(Folder::Datastores).await? {
            let state = self.open_datastore(&record).await;
            if let Err(problem) = &state {
                tracing::error!(datastore = record.name, %problem, "a datastore is missing");
            }
            let entry = DatastoreEntry { state, record };
            self.datastores.borrow_mut().insert(entry.record.name.clone(), entry);
        }
        Ok(())
    }

    pub(super) async fn close_datastores(&self) {
        let entries = std::mem::take(&mut *self.datastores.borrow_mut());
        for (name, entry) in entries {
            if let Ok(datastore) = entry.state
                && let Err(error) = datastore.volume.close().await
            {
                tracing::error!(datastore = name, %error, "it was not closed: its next opening checks it");
            }
        }
    }

    pub(super) fn datastore_troubles(&self) -> Vec<String> {
        let datastores = self.datastores.borrow();
        let broken =
            |e: &DatastoreEntry| Some(format!("datastore {}: {}", e.record.name, e.state.as_ref().err()?));
        datastores.values().filter_map(broken).collect()
    }

    /// An open datastore by name.
    pub(super) fn open_datastore_now(&self, name: &str) -> Outcome<Rc<Datastore>> {
        let datastores = self.datastores.borrow();
        let entry = datastores.get(name).ok_or_else(|| Problem::not_found("datastore", name))?;
        entry.state.clone()
    }

    /// All open datastores.
    pub(super) fn open_datastores_now(&self) -> Vec<Rc<Datastore>> {
        self.datastores.borrow().values().filter_map(|e| e.state.as_ref().ok().cloned()).collect()
    }

    /// The datastore that stands on a LUN.
    pub(super) fn datastore_on(&self, lun: Uuid) -> Option<Rc<Datastore>> {
        self.open_datastores_now().into_iter().find(|d| d.lun.uuid() == lun)
    }

    /// The datastore of a file name, and the path on it.
    pub(super) fn file(&self, text: &str) -> Outcome<(Rc<Datastore>, FileName)> {
        let name = FileName::parse(text)?;
        Ok((self.open_datastore_now(&name.datastore)?, name))
    }

    async fn datastore_view(
        &self,
        record: &DatastoreRecord,
        state: &Outcome<Rc<Datastore>>,
    ) -> DatastoreView {
        let mut view = DatastoreView {
            id: String::new(),
            name: record.name.clone(),
            state: "missing".into(),
            lun: record.lun.to_string(),
            version: String::new(),
            size_bytes: 0,
            free_bytes: 0,
            block_bytes: 0,
            trouble: None,
        };
        match state {
            Ok(datastore) => {
                let info = datastore.volume.info();
                view.id = info.uuid.to_string();
                view.state = "ok".into();
                view.lun = datastore.lun.name();
                view.version = format!("VMFS-{}", info.version);
                view.size_bytes = info.volume_bytes;
                view.block_bytes = info.block_bytes;
                match datastore.volume.free().await {
                    Ok(free) => view.free_bytes = free.blocks * info.block_bytes,
                    Err(error) => view.trouble = Some(error.to_string()),
                }
            }
            Err(problem) => view.trouble = Some(problem.to_string()),
        }
        view
    }

    /// All datastores.
    pub async fn datastores(&self) -> Outcome<Vec<DatastoreView>> {
        let all: Vec<_> =
            self.datastores.borrow().values().map(|e| (e.record.clone(), e.state.clone())).collect();
        let mut views = Vec::with_capacity(all.len());
        for (record, state) in &all {
            views.push(self.datastore_view(record, state).await);
        }
        Ok(views)
    }

    /// One datastore.
    pub async fn show_datastore(&self, name: &str) -> Outcome<DatastoreView> {
        let found = self.datastores.borrow().get(name).map(|e| (e.record.clone(), e.state.clone()));
        let (record, state) = found.ok_or_else(|| Problem::not_found("datastore", name))?;
        Ok(self.datastore_view(&record, &state).await)
    }

    /// Makes a VMFS datastore, on an existing LUN or on a new one.
    pub async fn create_datastore(&self, new: NewDatastore, dry: bool) -> Outcome<Change<DatastoreView>> {
        let _turn = self.turn.take().await;
        check_name("datastore", &new.name)?;
        if self.datastores.borrow().contains_key(&new.name) {
            if new.if_not_exists {
                return self.show_datastore(&new.name).await.map(Change::Done);
            }
            return Err(Problem::exists("datastore", &new.name));
        }
        let (on, made) = match (&new.lun, new.size_bytes) {
            (Some(lun), None) => {
                let found = self.lun(lun)?;
                self.unclaimed(&found, "formatted")?;
                if dry {
                    let usage = found.lun.usage().await.map_err(|e| {
                        super::pools::disk_problem(
                            "KGM-DST-0005",
                            format!("LUN \"{lun}\" cannot be read"),
                            &e,
                        )
                    })?;
                    let held = usage.own.bytes() + usage.below_bytes;
                    let loses = format!("what LUN {lun} holds ({})", show_size(held));
                    return Ok(Change::Would(Plan {
                        would: vec![format!("make a VMFS-5 on LUN {lun}")],
                        loses: if held > 0 { vec![loses] } else { Vec::new() },
                        frees_bytes: 0,
                    }));
                }
                (On::Lun(found), false)
            }
            (None, Some(size)) => {
                if size < SMALLEST {
                    return Err(Problem::usage(format!("{} is too small", show_size(size)))
                        .why(format!("a VMFS-5 has at least {}", show_size(SMALLEST))));
                }
                let (pool_name, pool) = self.check_new_lun(&new.name, size, new.pool.as_deref())?;
                if dry {
                    let size = show_size(size);
                    return Ok(Change::would(format!(
                        "make LUN {} with {size} and a VMFS-5 on it",
                        new.name
                    )));
                }
                (On::New { pool_name, pool, size }, true)
            }
            _ => return Err(Problem::usage("on what?").hint("--lun LUN or --size SIZE")),
        };
        let lun = match &on {
            On::Lun(found) => found.lun.uuid().to_string(),
            On::New { pool_name, .. } => format!("{pool_name}/{}", new.name),
        };
        let doing = Doing::MakeDatastore { name: new.name.clone(), lun, made };
        self.noted(doing, async || self.make_datastore(&new.name, on).await).await?;
        tracing::info!(datastore = new.name, "datastore made");
        self.show_datastore(&new.name).await.map(Change::Done)
    }

    async fn make_datastore(&self, name: &str, on: On) -> Outcome {
        let (found, made) = match on {
            On::Lun(found) => (found, false),
            On::New { pool_name, pool, size } => {
                let lun = self.make_lun(&pool, name, size).await?;
                (FoundLun { pool_name, pool, lun }, true)
            }
        };
        let datastore = match self.format(name, &found).await {
            Ok(datastore) => datastore,
            Err(problem) => {
                if made && let Err(error) = found.pool.pool.remove_lun(&found.lun.name(), true).await {
                    tracing::warn!(lun = name, %error, "the LUN made for the datastore stays");
                }
                return Err(problem);
            }
        };
        self.remember_datastore(name, found.lun.uuid(), datastore).await
    }

    /// Makes the volume, claims the LUN for it, opens it.
    async fn format(&self, name: &str, found: &FoundLun) -> Outcome<Rc<Datastore>> {
        let (lun_name, lun_uuid) = (found.lun.name(), found.lun.uuid());
        let mut volume = NewVolume::new(name, 1, SystemTime::now());
        if let Some(device) = volume.devices.first_mut() {
            let naa = array::identity::naa(lun_uuid);
            *device = vmfs::create::DeviceIdentity::naa(naa, b"kagami", device.uuid);
        }
        let device = Rc::clone(&found.lun) as Rc<dyn Disk>;
        let created = vmfs::create(vec![device], &volume).await.map_err(|e| {
            let problem = create_problem(&format!("LUN {lun_name}"), &e);
            match problem.kind {
                // Over what is recognised nothing is made, confirmed or not.
                Kind::Refused => {
                    problem.hint(format!("another LUN, or kagami datastore attach {lun_name} for a volume"))
                }
                _ => problem,
            }
        })?;
        let uuid = Uuid::from_bytes(created.file_system_uuid.0);
        let claim = Claim::Datastore { uuid, label: name.to_owned() };
        found
            .lun
            .claim(Some(claim))
            .await
            .map_err(|e| pool_problem(format!("LUN \"{lun_name}\" was not claimed"), &e))?;
        self.open_volume(name, found).await
    }

    /// Checks a volume; everything on it is settled first, and nothing is written meanwhile but by its own disks.
    pub async fn check_datastore(&self, name: &str) -> Outcome<CheckView> {
        let datastore = self.open_datastore_now(name)?;
        let failed = |e: vmfs::Error| vmfs_problem(format!("datastore \"{name}\" cannot be checked"), &e);
        datastore.volume.settle().await.map_err(failed)?;
        // A frozen image of it: disks may be written meanwhile.
        let image = self.frozen_image(&datastore).await?;
        let checked = self.check_frozen(&datastore, &image.disk).await;
        self.drop_image(image).await;
        let report = checked.map_err(|e| {
            Problem::failed("KGM-DST-0002", format!("datastore \"{name}\" cannot be checked"), e)
        })?;
        // That it is mounted is no news: it is this home that has it open.
        let news = report.findings().iter().filter(|finding| finding.what != vmfs::check::What::Mounted);
        Ok(CheckView {
            name: name.to_owned(),
            verdict: match report.exit_code() {
                0 => "clean",
                3 => "leaks",
                _ => "corrupt",
            }
            .into(),
            findings: news.map(ToString::to_string).collect(),
            repaired: Vec::new(),
        })
    }

    /// Checks a frozen image of a datastore, its mappings against the LUNs and claims of this home.
    async fn check_frozen(
        &self,
        datastore: &Datastore,
        image: &Rc<dyn Disk>,
    ) -> Result<vmfs::Report, vmfs::check::CheckError> {
        let devices = vec![Rc::clone(image)];
        let facts = match Volume::open(devices.clone(), Mode::Read).await {
            Ok(volume) => Facts::collect(&volume).await,
            Err(_) => Facts::default(),
        };
        let visible = self.visible();
        let claim = |path: &str| self.claimed_identity(datastore, path);
        let around = Around { visible: &visible, claim: &claim };
        let judge = |mapping: &vmfs::check::Mapping| facts.judge(mapping, around);
        vmfs::check(devices, vmfs::check::Options { repair_leaks: false, mapping: Some(&judge) }).await
    }

    /// After a pool came to this home: its datastores and the VMs on them are registered, as far as they are not.
    pub(super) async fn import_what_lies_in(&self, pool: &str) -> Outcome {
        let open = self.pool(pool)?;
        for lun in open.pool.luns() {
            let Some(Claim::Datastore { label: mut name, .. }) = lun.claimed_by() else { continue };
            // An import that a crash cut off may have come as far as the datastore, and not to all of its VMs.
            if let [known] = &self.datastores_on(&[lun.uuid()])[..] {
                if let Ok(datastore) = self.open_datastore_now(known) {
                    self.register_all_on(&datastore).await?;
                }
                continue;
            }
            if check_name("datastore", &name).is_err() || self.datastores.borrow().contains_key(&name) {
                name = lun.name();
            }
            if self.datastores.borrow().contains_key(&name) {
                tracing::warn!(lun = lun.name(), "a datastore of this name is here already; not registered");
                continue;
            }
            let record = DatastoreRecord { format: 1, name: name.clone(), lun: lun.uuid() };
            let state = self.open_datastore(&record).await;
            self.save(Folder::Datastores, &name, record.clone()).await?;
            let opened = state.clone();
            self.datastores.borrow_mut().insert(name.clone(), DatastoreEntry { record, state });
            match opened {
                Ok(datastore) => self.register_all_on(&datastore).await?,
                Err(problem) => tracing::error!(datastore = name, %problem, "a datastore cannot be opened"),
            }
        }
        Ok(())
    }
}
