//! Long work: a job has a file of its own, progress, and an answer. A job that a restart of the daemon interrupted is
//! begun again; what it works with makes that safe (a backup goes on with its cut where that still stands, and without
//! manifest is none; a restore writes the same).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::files::{self, RecordError, Versioned};
use crate::model::{JobView, NewBackup, NewRestore, UndoRestore};
use crate::problem::{Kind, Outcome, Problem};
use crate::store::RemoteStore;

/// Ended jobs that are kept; older ones go when a new one begins.
const KEPT: usize = 200;

/// How far a job is. Shared between the lane that works and whoever looks.
#[derive(Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    suspended: AtomicBool,
    note: Mutex<Option<String>>,
    phase: Mutex<String>,
}

impl Progress {
    /// Begins the next step.
    pub fn phase(&self, name: &str) {
        tracing::debug!(phase = name, "job");
        name.clone_into(&mut self.phase.lock().unwrap_or_else(|e| e.into_inner()));
    }

    /// Says what the job's owner should know.
    pub fn note(&self, text: &str) {
        *lock(&self.note) = Some(text.to_owned());
    }

    /// Bytes done of bytes to do.
    pub fn set(&self, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    /// Somebody wants it to end early.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Asks it to end early.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Asks it to end early because the daemon ends: it goes on at the next start, and leaves what it needs for that.
    pub fn suspend(&self) {
        self.suspended.store(true, Ordering::Relaxed);
        self.cancel();
    }

    /// It is to go on at the next start.
    pub fn is_suspended(&self) -> bool {
        self.suspended.load(Ordering::Relaxed)
    }

    /// An error when it should end early: for places where everything is in order.
    pub fn check(&self) -> Outcome {
        if self.is_cancelled() { Err(cancelled()) } else { Ok(()) }
    }
}

/// How a job ends that somebody cancelled.
pub fn cancelled() -> Problem {
    Problem::new("KGM-JOB-0001", Kind::Failed, "the job was cancelled")
        .hint("begin it again: what a backup has stored already is used")
}

/// What a job has to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Work {
    /// Back a VM up.
    Backup(NewBackup),
    /// Restore a backup.
    Restore(NewRestore),
    /// Bring back what was there before a restore in place.
    UndoRestore(UndoRestore),
}

impl Work {
    fn kind(&self) -> &'static str {
        match self {
            Self::Backup(_) => "backup",
            Self::Restore(_) => "restore",
            Self::UndoRestore(_) => "undo-restore",
        }
    }

    fn object(&self) -> String {
        match self {
            Self::Backup(new) => new.vms().join(", "),
            Self::Restore(new) => new.backup.clone(),
            Self::UndoRestore(new) => new.vm.clone(),
        }
    }
}

/// What is in a job's file.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    format: u32,
    view: JobView,
    work: Work,
}

impl Versioned for Record {
    const FORMAT: u32 = 1;
}

struct Job {
    record: Mutex<Record>,
    progress: Arc<Progress>,
    ended: watch::Sender<bool>,
}

impl Job {
    fn view(&self) -> JobView {
        let mut view = lock(&self.record).view.clone();
        if view.state == "running" {
            view.phase.clone_from(&lock(&self.progress.phase));
            view.note = lock(&self.progress.note).clone().or(view.note);
            view.done_bytes = self.progress.done.load(Ordering::Relaxed);
            view.total_bytes = self.progress.total.load(Ordering::Relaxed);
        }
        view
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// A job whose file is of a newer format.
fn strange_view(file: &str, problem: Problem) -> JobView {
    JobView {
        id: file.trim_end_matches(".json").to_owned(),
        kind: "unknown".into(),
        object: String::new(),
        state: "unreadable".into(),
        phase: String::new(),
        note: None,
        done_bytes: 0,
        total_bytes: 0,
        created_at: String::new(),
        ended_at: None,
        attempts: 0,
        result: None,
        problem: Some(problem),
    }
}

/// Hears of jobs that begin and end.
type Listener = Box<dyn Fn(&JobView) + Send>;

struct Inner {
    dir: PathBuf,
    store: RemoteStore,
    jobs: Mutex<BTreeMap<String, Arc<Job>>>,
    /// Jobs of a newer kagami: shown, and left alone.
    strange: Vec<JobView>,
    /// Called with every job that begins or ends.
    listener: Mutex<Option<Listener>>,
    draining: AtomicBool,
}

/// All jobs of a daemon.
#[derive(Clone)]
pub struct Jobs {
    inner: Arc<Inner>,
}

impl Jobs {
    /// Reads the job files. Nothing runs yet: see [`Jobs::resume_all`].
    pub fn open(dir: PathBuf, store: RemoteStore) -> Outcome<Self> {
        let failed = |e| Problem::failed("KGM-JOB-0002", format!("cannot read {}", dir.display()), e);
        let (records, bad) = files::load_all::<Record>(&dir).map_err(failed)?;
        let mut strange = Vec::new();
        for (name, error) in bad {
            tracing::warn!(name, %error, "a job file cannot be read; it is left alone");
            if let RecordError::Newer { found, known } = error {
                strange.push(strange_view(&name, files::newer(&dir.join(&name), found, known)));
            }
        }
        let jobs = records
            .into_iter()
            .map(|record| {
                let ended = watch::Sender::new(record.view.state != "running");
                let id = record.view.id.clone();
                (id, Arc::new(Job { record: Mutex::new(record), progress: Arc::default(), ended }))
            })
            .collect();
        let inner = Inner {
            dir,
            store,
            jobs: Mutex::new(jobs),
            strange,
            listener: Mutex::new(None),
            draining: AtomicBool::new(false),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Sets what is called with every job that begins or ends.
    pub fn on_change(&self, call: impl Fn(&JobView) + Send + 'static) {
        *lock(&self.inner.listener) = Some(Box::new(call));
    }

    fn tell(&self, job: &Job) {
        if let Some(call) = &*lock(&self.inner.listener) {
            call(&job.view());
        }
    }

    /// Backups that [`Jobs::resume_all`] will begin again.
    pub fn interrupted_backups(&self) -> Vec<NewBackup> {
        let jobs = lock(&self.inner.jobs);
        let records = jobs.values().map(|job| lock(&job.record).clone());
        let backups = records.filter(|r| r.view.state == "running").filter_map(|r| match r.work {
            Work::Backup(new) => Some(new),
            Work::Restore(_) | Work::UndoRestore(_) => None,
        });
        backups.collect()
    }

    /// Begins interrupted jobs again.
    pub fn resume_all(&self) {
        let interrupted: Vec<Arc<Job>> = lock(&self.inner.jobs)
            .values()
            .filter(|j| lock(&j.record).view.state == "running")
            .cloned()
            .collect();
        for job in interrupted {
            let view = job.view();
            tracing::info!(
                job = view.id,
                kind = view.kind,
                object = view.object,
                "begun again after a restart"
            );
            self.start(job);
        }
    }

    /// Begins a job.
    pub fn begin(&self, work: Work) -> Outcome<JobView> {
        if self.inner.draining.load(Ordering::Relaxed) {
            return Err(Problem::new("KGM-JOB-0003", Kind::Unreachable, "the daemon is stopping"));
        }
        let view = JobView {
            id: uuid::Uuid::now_v7().simple().to_string(),
            kind: work.kind().into(),
            object: work.object(),
            state: "running".into(),
            phase: String::new(),
            note: None,
            done_bytes: 0,
            total_bytes: 0,
            created_at: jiff::Timestamp::now().to_string(),
            ended_at: None,
            attempts: 0,
            result: None,
            problem: None,
        };
        let id = view.id.clone();
        let record = Mutex::new(Record { format: Record::FORMAT, view, work });
        let job = Arc::new(Job { record, progress: Arc::default(), ended: watch::Sender::new(false) });
        self.prune();
        lock(&self.inner.jobs).insert(id, Arc::clone(&job));
        self.start(Arc::clone(&job));
        Ok(job.view())
    }

    fn start(&self, job: Arc<Job>) {
        let work = {
            let mut record = lock(&job.record);
            record.view.attempts += 1;
            record.work.clone()
        };
        self.save(&job);
        self.tell(&job);
        let jobs = self.clone();
        tokio::spawn(async move {
            let begun = std::time::Instant::now();
            let (store, progress) = (&jobs.inner.store, Arc::clone(&job.progress));
            let result = match work {
                Work::Backup(new) => store.backup(new, progress).await,
                Work::Restore(new) => store.restore(new, progress).await,
                Work::UndoRestore(new) => store.undo_restore(new.vm, progress).await,
            };
            jobs.finish(&job, result);
            let view = job.view();
            let seconds = begun.elapsed().as_secs_f64();
            tracing::info!(job = view.id, kind = view.kind, state = view.state, seconds, "job ended");
        });
    }

    fn finish(&self, job: &Arc<Job>, result: Outcome<serde_json::Value>) {
        {
            let now = job.view();
            let mut record = lock(&job.record);
            let view = &mut record.view;
            (view.phase, view.note) = (now.phase, now.note);
            (view.done_bytes, view.total_bytes) = (now.done_bytes, now.total_bytes);
            view.ended_at = Some(jiff::Timestamp::now().to_string());
            match result {
                Ok(value) => {
                    view.state = "done".into();
                    view.result = Some(value);
                }
                Err(problem) => {
                    let cancelled = job.progress.is_cancelled();
                    // Stopping the daemon interrupts a job, it does not end it: the file still says "running".
                    if cancelled && self.inner.draining.load(Ordering::Relaxed) {
                        view.ended_at = None;
                        drop(record);
                        let _ = job.ended.send(true);
                        return;
                    }
                    view.state = if cancelled { "cancelled" } else { "failed" }.into();
                    view.problem = Some(problem);
                }
            }
        }
        self.save(job);
        self.tell(job);
        job.ended.send_replace(true);
    }

    fn save(&self, job: &Job) {
        let record = lock(&job.record).clone();
        let path = self.inner.dir.join(format!("{}.json", record.view.id));
        if let Err(error) = files::save(&path, &record) {
            tracing::warn!(job = record.view.id, %error, "the job file cannot be written");
        }
    }

    /// Forgets the oldest ended jobs.
    fn prune(&self) {
        let mut jobs = lock(&self.inner.jobs);
        let ended: Vec<String> = jobs
            .iter()
            .filter(|(_, job)| lock(&job.record).view.state != "running")
            .map(|(id, _)| id.clone())
            .collect();
        for id in ended.iter().take(ended.len().saturating_sub(KEPT)) {
            jobs.remove(id);
            let _ = files::remove(&self.inner.dir.join(format!("{id}.json"))); // tried again at the next job
        }
    }

    /// All jobs, oldest first.
    pub fn list(&self) -> Vec<JobView> {
        let own = lock(&self.inner.jobs).values().map(|job| job.view()).collect::<Vec<_>>();
        self.inner.strange.iter().cloned().chain(own).collect()
    }

    fn find(&self, id: &str) -> Outcome<Arc<Job>> {
        let jobs = lock(&self.inner.jobs);
        let mut found =
            jobs.range(id.to_owned()..).take_while(|(key, _)| key.starts_with(id)).map(|(_, job)| job);
        match (id.is_empty(), found.next(), found.next()) {
            (false, Some(job), None) => Ok(Arc::clone(job)),
            (false, Some(_), Some(_)) => {
                Err(Problem::new("KGM-JOB-0004", Kind::Usage, format!("several jobs begin with \"{id}\"")))
            }
            _ => Err(Problem::not_found("job", id)),
        }
    }

    /// One job, by the beginning of its id.
    pub fn show(&self, id: &str) -> Outcome<JobView> {
        Ok(self.find(id)?.view())
    }

    /// Waits until a job has ended, or for `time`.
    pub async fn wait(&self, id: &str, time: std::time::Duration) -> Outcome<JobView> {
        let job = self.find(id)?;
        let mut ended = job.ended.subscribe();
        let _ = tokio::time::timeout(time, ended.wait_for(|ended| *ended)).await; // the view says which
        Ok(job.view())
    }

    /// Asks a job to end early.
    pub fn cancel(&self, id: &str) -> Outcome<JobView> {
        let job = self.find(id)?;
        let view = job.view();
        if view.state != "running" {
            return Err(Problem::new("KGM-JOB-0006", Kind::Conflict, format!("job {} has ended", view.id))
                .why(format!("it is {}", view.state))
                .hint(format!("kagami job show {}", view.id)));
        }
        job.progress.cancel();
        Ok(view)
    }

    /// Stops all jobs where everything is in order; they go on at the next start.
    pub async fn drain(&self) {
        self.inner.draining.store(true, Ordering::Relaxed);
        let running: Vec<Arc<Job>> =
            lock(&self.inner.jobs).values().filter(|j| !*j.ended.borrow()).cloned().collect();
        for job in &running {
            job.progress.suspend();
        }
        for job in running {
            let mut ended = job.ended.subscribe();
            let time = std::time::Duration::from_secs(30);
            if tokio::time::timeout(time, ended.wait_for(|ended| *ended)).await.is_err() {
                tracing::warn!(job = job.view().id, "does not stop; it goes on at the next start");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_jobs_of_format_1_are_read() {
        for (name, kind) in [("jobs/backup.json", "backup"), ("jobs/restore.json", "restore")] {
            let record = files::golden::<Record>(name);
            assert_eq!((record.view.kind.as_str(), record.work.kind()), (kind, kind), "{name}");
        }
    }
}
