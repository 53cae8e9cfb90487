//! The daemon: one per home, by lock. REST on a Unix socket of mode 0600, one lane for the data, jobs.

mod lock;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

pub use lock::HomeLock;

use crate::api::{self, Daemon, Events, Replies};
use crate::config::{Log, Serving};
use crate::home::Home;
use crate::jobs::Jobs;
use crate::metrics::Metrics;
use crate::problem::{Kind, Outcome, Problem};
use crate::store::RemoteStore;

/// How the daemon runs.
#[derive(Clone)]
pub struct Options {
    /// Its log.
    pub log: Log,
    /// Where it serves exports.
    pub serving: Serving,
}

/// Runs the daemon until SIGTERM, SIGINT or `serve --stop`.
pub fn serve(home: &Home, options: &Options) -> Outcome {
    home.check_socket_length()?;
    home.make()?;
    let lock = HomeLock::take(home)?;
    start_log(&options.log);
    abort_on_panic();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("kagami-api")
        .enable_all()
        .build()
        .map_err(|e| Problem::failed("KGM-SRV-0003", "the daemon cannot start", e))?;
    let ended = runtime.block_on(run(home, options));
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    drop(lock);
    ended
}

async fn run(home: &Home, options: &Options) -> Outcome {
    let failed = |e: std::io::Error| Problem::failed("KGM-SRV-0003", "the daemon cannot start", e);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let lane =
        lane::start(lane::Options { name: "kagami-lane".into(), ..Default::default() }).map_err(failed)?;
    let (events, metrics) = (Events::new(), Arc::new(Metrics::new()));
    let (serving, measured) = (options.serving.clone(), Arc::clone(&metrics));
    let store = RemoteStore::open(lane, home.clone(), serving, events.clone(), measured).await?;
    let jobs = Jobs::open(home.join("jobs"), store.clone())?;
    listen_to_jobs(&jobs, &events, &metrics);
    let (stop, mut stopping) = watch::channel(false);
    let daemon = Arc::new(Daemon {
        home: home.clone(),
        store: store.clone(),
        jobs: jobs.clone(),
        metrics,
        events: events.clone(),
        replies: Replies::open(home.join("replies"))?,
        stop,
        started: jiff::Timestamp::now(),
    });
    let listener = listen(home)?;
    store.keep_cuts(jobs.interrupted_backups()).await;
    jobs.resume_all();
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]); // fails only without systemd
    let watchdog = sd_notify::watchdog_enabled().map(|time| tokio::spawn(ping(time / 2, store.clone())));
    tracing::info!(home = %home.dir().display(), version = env!("CARGO_PKG_VERSION"), "serving");
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
            _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
            _ = stopping.wait_for(|stop| *stop) => tracing::info!("asked to stop: draining"),
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        events.close(); // a listener would keep its connection, and that the server
    };
    let served = axum::serve(listener, api::router(daemon)).with_graceful_shutdown(shutdown).await;
    let _ = std::fs::remove_file(home.api_socket());
    if let Some(watchdog) = watchdog {
        watchdog.abort();
    }
    jobs.drain().await;
    store.close().await;
    tracing::info!("ended");
    served.map_err(|e| Problem::failed("KGM-SRV-0004", "the REST interface failed", e))
}

/// The socket appears under its name only when it takes connections, with its final mode. A file that is there already
/// is stale: the lock is ours.
fn listen(home: &Home) -> Outcome<UnixListener> {
    let (socket, temp) = (home.api_socket(), home.join("api.sock.new"));
    let open = || {
        crate::files::remove(&temp)?;
        let listener = UnixListener::bind(&temp)?;
        std::fs::set_permissions(&temp, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&temp, &socket)?;
        Ok(listener)
    };
    open().map_err(|e: std::io::Error| {
        Problem::failed("KGM-SRV-0005", format!("cannot listen on {}", socket.display()), e)
    })
}

/// Tells systemd that the daemon is alive, as long as the lane answers: a lane that stands still serves nobody.
async fn ping(every: std::time::Duration, store: RemoteStore) {
    loop {
        store.ask(|_| async {}).await;
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]); // the next one may get through
        tokio::time::sleep(every).await;
    }
}

fn start_log(log: &Log) {
    let level = log.level.as_deref().unwrap_or("info");
    let filter = tracing_subscriber::EnvFilter::try_from_env("KAGAMI_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    let json = log.json;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    let started = if json { log.json().try_init() } else { log.try_init() };
    if started.is_err() {
        eprintln!("kagami: the log was started already");
    }
}

/// A panic is a bug of ours, and half a change in memory must not go on to be written: the process ends, and the next
/// one recovers from what is durable.
fn abort_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        tracing::error!(%panic, "a bug: the daemon ends itself");
        std::process::abort();
    }));
}

/// Answer when another daemon has the home.
fn in_use(home: &Home, pid: &str) -> Problem {
    Problem::new("KGM-SRV-0409", Kind::Conflict, format!("a daemon runs on {} already", home.dir().display()))
        .why(format!("process {pid} holds its lock"))
        .hint(format!("kagami --home {} serve --stop", home.dir().display()))
}

/// Metrics hear of every job that ends; whoever listens to events hears of it too.
fn listen_to_jobs(jobs: &Jobs, events: &Events, metrics: &Arc<Metrics>) {
    let (heard, events) = (Arc::clone(metrics), events.clone());
    jobs.on_change(move |job| {
        events.tell(&format!("job.{}", job.state), job);
        if job.state == "running" {
            return;
        }
        heard.job_ended(&job.kind, &job.state);
        if let (Some(result), "backup", "done") = (&job.result, job.kind.as_str(), job.state.as_str()) {
            let number = |name: &str| result.get(name).and_then(serde_json::Value::as_f64).unwrap_or(0.0);
            let several = result.get("backups").and_then(serde_json::Value::as_array);
            match several {
                None => heard.backup_done(&job.object, number("seconds")),
                Some(rows) => {
                    let vms = rows.iter().filter_map(|row| row.get("vm")?.as_str());
                    vms.for_each(|vm| heard.backup_done(vm, number("seconds")));
                }
            }
        }
    });
}
