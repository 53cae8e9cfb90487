//! Prometheus metrics: counters that live here, and gauges that are asked from the store at each scrape.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use front::request::{LATENCY_BUCKETS, Operation, Tally};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::model::{DatastoreView, LunView, PoolView, VmView};

/// Label of a LUN.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct LunLabel {
    /// Its name.
    pub lun: String,
}

/// Label of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PoolLabel {
    /// Its name.
    pub pool: String,
}

/// Label of a datastore.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DatastoreLabel {
    /// Its name.
    pub datastore: String,
}

/// Labels of a job.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct JobLabel {
    /// `backup`, `restore`.
    pub kind: String,
    /// `done`, `failed`, `cancelled`.
    pub state: String,
}

/// Label of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct VmLabel {
    /// Its name.
    pub vm: String,
}

/// What the store looks like at a scrape.
#[derive(Default)]
pub struct Seen {
    /// All pools.
    pub pools: Vec<PoolView>,
    /// All LUNs.
    pub luns: Vec<LunView>,
    /// All datastores.
    pub datastores: Vec<DatastoreView>,
    /// All VMs.
    pub vms: Vec<VmView>,
    /// All exports that serve.
    pub exports: Vec<ExportCounts>,
}

/// What an export has done since it was added. The front ends count where they answer, on the lane, without a lock; here
/// it is a copy.
#[derive(Clone, Debug)]
pub struct ExportCounts {
    /// Its name.
    pub export: String,
    /// What is served.
    pub target: String,
    /// The LUN under it.
    pub lun: String,
    /// Requests not answered yet.
    pub in_flight: u64,
    /// What was counted of each operation.
    pub tallies: Vec<(Operation, Tally)>,
}

impl ExportCounts {
    fn tally(&self, operation: Operation) -> Tally {
        let found = self.tallies.iter().find(|(o, _)| *o == operation);
        found.map(|(_, tally)| *tally).unwrap_or_default()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ExportLabel {
    export: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ExportErrorLabel {
    export: String,
    operation: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ExportInfo {
    export: String,
    target: String,
    lun: String,
}

/// Exports as they were counted at the last scrape.
#[derive(Debug, Default)]
struct ExportCollector(Mutex<Vec<ExportCounts>>);

/// Operations that clients do often enough to be told one by one, with the word for many of them.
const COUNTED: [(Operation, &str); 5] = [
    (Operation::Read, "reads"),
    (Operation::Write, "writes"),
    (Operation::Flush, "flushes"),
    (Operation::Unmap, "unmaps"),
    (Operation::Zero, "zeroes"),
];

/// Upper ends of the buckets in seconds with what is in each: the lane counts by powers of two of a microsecond.
fn buckets(tally: &Tally) -> Vec<(f64, u64)> {
    let end = |n: usize| match n + 1 {
        LATENCY_BUCKETS => f64::INFINITY,
        _ => 2_f64.powi(i32::try_from(n).unwrap_or(i32::MAX)) / 1e6,
    };
    tally.latency.iter().enumerate().map(|(n, count)| (end(n), *count)).collect()
}

impl ExportCollector {
    /// One metric with a line, or a histogram, for each export.
    fn each<S: EncodeLabelSet>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        (name, help, unit, kind): (&str, &str, Option<&Unit>, MetricType),
        mut label: impl FnMut(&ExportCounts) -> S,
        mut put: impl FnMut(&ExportCounts, MetricEncoder<'_>) -> std::fmt::Result,
    ) -> std::fmt::Result {
        let mut family = encoder.encode_descriptor(name, help, unit, kind)?;
        for counts in &*self.0.lock().unwrap_or_else(|e| e.into_inner()) {
            put(counts, family.encode_family(&label(counts))?)?;
        }
        Ok(())
    }
}

impl Collector for ExportCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        use MetricType::{Counter, Gauge, Histogram};
        let label = |counts: &ExportCounts| ExportLabel { export: counts.export.clone() };
        let info = |c: &ExportCounts| ExportInfo {
            export: c.export.clone(),
            target: c.target.clone(),
            lun: c.lun.clone(),
        };
        let what = ("export_info", "What an export serves", None, Gauge);
        self.each(&mut encoder, what, info, |_, mut to| to.encode_gauge(&1_u64))?;
        let what = ("export_in_flight", "Requests of an export not answered yet", None, Gauge);
        self.each(&mut encoder, what, label, |counts, mut to| to.encode_gauge(&counts.in_flight))?;
        for (operation, many) in COUNTED {
            let one = operation.name();
            let (name, help) = (format!("export_{many}"), format!("Requests of this kind answered: {one}"));
            self.each(&mut encoder, (&name, &help, None, Counter), label, |counts, mut to| {
                to.encode_counter::<NoLabelSet, _, u64>(&counts.tally(operation).done, None)
            })?;
            let (name, help) = (format!("export_{one}"), format!("From receipt to answer of a {one}"));
            self.each(
                &mut encoder,
                (&name, &help, Some(&Unit::Seconds), Histogram),
                label,
                |counts, mut to| {
                    let tally = counts.tally(operation);
                    let sum = tally.nanoseconds as f64 / 1e9;
                    to.encode_histogram::<NoLabelSet>(sum, tally.done, &buckets(&tally), None)
                },
            )?;
            let help = format!("Bytes of requests that went well: {one}");
            if operation != Operation::Flush {
                self.each(
                    &mut encoder,
                    (&name, &help, Some(&Unit::Bytes), Counter),
                    label,
                    |counts, mut to| {
                        to.encode_counter::<NoLabelSet, _, u64>(&counts.tally(operation).bytes, None)
                    },
                )?;
            }
        }
        let what = ("export_errors", "Requests answered with an error", None, Counter);
        let mut family = encoder.encode_descriptor(what.0, what.1, what.2, what.3)?;
        for counts in &*self.0.lock().unwrap_or_else(|e| e.into_inner()) {
            for (operation, tally) in &counts.tallies {
                let label = ExportErrorLabel { export: counts.export.clone(), operation: operation.name() };
                let mut to = family.encode_family(&label)?;
                to.encode_counter::<NoLabelSet, _, u64>(&tally.failed, None)?;
            }
        }
        Ok(())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: String,
}

/// All metrics of the daemon.
pub struct Metrics {
    registry: Mutex<Registry>,
    lun_size: Family<LunLabel, Gauge>,
    snapshots: Family<LunLabel, Gauge>,
    pool_size: Family<PoolLabel, Gauge>,
    pool_used: Family<PoolLabel, Gauge>,
    datastore_free: Family<DatastoreLabel, Gauge>,
    vm_held: Family<VmLabel, Gauge>,
    vm_held_time: Family<VmLabel, Gauge<f64, AtomicU64>>,
    jobs: Family<JobLabel, Counter>,
    backup_success: Family<VmLabel, Gauge>,
    backup_duration: Histogram,
    cut_hold: Histogram,
    commit_hold: Histogram,
    exports: Arc<ExportCollector>,
}

impl Metrics {
    /// Registers them.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("kagami");
        let build = Family::<Build, Gauge>::default();
        build.get_or_create(&Build { version: env!("CARGO_PKG_VERSION").into() }).set(1);
        registry.register("build_info", "Version of the running program", build);
        let all = Self {
            lun_size: Family::default(),
            snapshots: Family::default(),
            pool_size: Family::default(),
            pool_used: Family::default(),
            datastore_free: Family::default(),
            vm_held: Family::default(),
            vm_held_time: Family::default(),
            jobs: Family::default(),
            backup_success: Family::default(),
            backup_duration: Histogram::new(exponential_buckets(0.1, 3.0, 12)),
            cut_hold: Histogram::new(exponential_buckets(0.000_05, 2.0, 16)),
            commit_hold: Histogram::new(exponential_buckets(0.000_05, 2.0, 16)),
            exports: Arc::default(),
            registry: Mutex::new(Registry::default()),
        };
        let mut bytes = |name: &str, help: &str, family: &Family<LunLabel, Gauge>| {
            registry.register_with_unit(name, help, Unit::Bytes, family.clone());
        };
        bytes("lun_size", "Size of a LUN", &all.lun_size);
        registry.register("snapshot_count", "Snapshots of a LUN", all.snapshots.clone());
        registry.register_with_unit("pool_size", "Room of a pool", Unit::Bytes, all.pool_size.clone());
        registry.register_with_unit(
            "pool_used",
            "Bytes allocated in a pool",
            Unit::Bytes,
            all.pool_used.clone(),
        );
        let free = all.datastore_free.clone();
        registry.register_with_unit("datastore_free", "Bytes free on a datastore", Unit::Bytes, free);
        let help = "Operations of a VM that wait for room";
        registry.register("vm_held_operations", help, all.vm_held.clone());
        let help = "How long writes of a VM were held for want of room since it was opened";
        registry.register_with_unit("vm_held", help, Unit::Seconds, all.vm_held_time.clone());
        registry.register("jobs", "Jobs ended", all.jobs.clone());
        let success = all.backup_success.clone();
        let help = "When the last backup of a VM was sealed";
        registry.register_with_unit("backup_last_success_timestamp", help, Unit::Seconds, success);
        let duration = all.backup_duration.clone();
        registry.register_with_unit("backup_duration", "Time of a backup", Unit::Seconds, duration);
        let hold = all.cut_hold.clone();
        let help = "From the first gate closed to the last gate opened of a cut";
        registry.register_with_unit("cut_hold", help, Unit::Seconds, hold);
        let hold = all.commit_hold.clone();
        let help = "Gate of a disk closed for the commit of its redo log: once to begin, once to flip";
        registry.register_with_unit("commit_hold", help, Unit::Seconds, hold);
        registry.register_collector(Box::new(Arc::clone(&all.exports)));
        *all.registry.lock().unwrap_or_else(|e| e.into_inner()) = registry;
        all
    }

    /// A job has ended.
    pub fn job_ended(&self, kind: &str, state: &str) {
        self.jobs.get_or_create(&JobLabel { kind: kind.into(), state: state.into() }).inc();
    }

    /// A backup was sealed.
    pub fn backup_done(&self, vm: &str, seconds: f64) {
        let now = jiff::Timestamp::now().as_second();
        self.backup_success.get_or_create(&VmLabel { vm: vm.into() }).set(now);
        self.backup_duration.observe(seconds);
    }

    /// A cut held writes back for this long.
    pub fn cut_held(&self, time: Duration) {
        self.cut_hold.observe(time.as_secs_f64());
    }

    /// Commits held writes back for these times.
    pub fn commits_held(&self, times: &[Duration]) {
        times.iter().for_each(|time| self.commit_hold.observe(time.as_secs_f64()));
    }

    /// The text for a scrape, with these objects as they are now.
    pub fn render(&self, seen: &Seen) -> String {
        let Seen { pools, luns, datastores, vms, exports } = seen;
        exports.clone_into(&mut self.exports.0.lock().unwrap_or_else(|e| e.into_inner()));
        let gauge = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        for family in [&self.lun_size, &self.snapshots] {
            family.clear();
        }
        self.pool_size.clear();
        self.pool_used.clear();
        self.datastore_free.clear();
        self.vm_held.clear();
        self.vm_held_time.clear();
        for lun in luns {
            let label = LunLabel { lun: lun.name.clone() };
            self.lun_size.get_or_create(&label).set(gauge(lun.size_bytes));
            self.snapshots.get_or_create(&label).set(gauge(lun.snapshots.len() as u64));
        }
        for pool in pools {
            let label = PoolLabel { pool: pool.name.clone() };
            self.pool_size.get_or_create(&label).set(gauge(pool.size_bytes));
            self.pool_used.get_or_create(&label).set(gauge(pool.used_bytes));
        }
        for datastore in datastores {
            let label = DatastoreLabel { datastore: datastore.name.clone() };
            self.datastore_free.get_or_create(&label).set(gauge(datastore.free_bytes));
        }
        for vm in vms {
            let label = VmLabel { vm: vm.name.clone() };
            let held = vm.disks.iter().filter_map(|d| d.held.as_ref());
            self.vm_held.get_or_create(&label).set(gauge(held.map(|h| h.operations).sum()));
            self.vm_held_time.get_or_create(&label).set(vm.held_seconds);
        }
        let mut text = String::new();
        let registry = self.registry.lock().unwrap_or_else(|e| e.into_inner());
        match encode(&mut text, &registry) {
            Ok(()) => text,
            Err(_) => String::new(), // writing to a String does not fail
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rules_of_prometheus() {
        let metrics = Metrics::new();
        metrics.job_ended("backup", "done");
        metrics.backup_done("mail", 2.5);
        metrics.cut_held(Duration::from_millis(1));
        metrics.commits_held(&[Duration::from_millis(2), Duration::from_micros(60)]);
        let mut tally = Tally { done: 3, failed: 1, bytes: 8192, nanoseconds: 6_000_000, ..Tally::default() };
        (tally.latency[2], tally.latency[LATENCY_BUCKETS - 1]) = (2, 1);
        let exports = vec![ExportCounts {
            export: "d".into(),
            target: "sql01/scsi0:1".into(),
            lun: "sql01-d".into(),
            in_flight: 4,
            tallies: vec![(Operation::Write, tally)],
        }];
        let text = metrics.render(&Seen { exports, ..Seen::default() });
        for wanted in [
            "kagami_export_info{export=\"d\",target=\"sql01/scsi0:1\",lun=\"sql01-d\"} 1",
            "kagami_export_in_flight{export=\"d\"} 4",
            "# TYPE kagami_export_writes counter",
            "kagami_export_writes_total{export=\"d\"} 3",
            "kagami_export_reads_total{export=\"d\"} 0",
            "kagami_export_write_bytes_total{export=\"d\"} 8192",
            "# TYPE kagami_export_write_seconds histogram",
            "kagami_export_write_seconds_sum{export=\"d\"} 0.006",
            "kagami_export_write_seconds_bucket{le=\"0.000002\",export=\"d\"} 0",
            "kagami_export_write_seconds_bucket{le=\"0.000004\",export=\"d\"} 2",
            "kagami_export_write_seconds_bucket{le=\"+Inf\",export=\"d\"} 3",
            "kagami_export_errors_total{export=\"d\",operation=\"write\"} 1",
            "kagami_commit_hold_seconds_count 2",
            "kagami_build_info{version=",
            "kagami_jobs_total{kind=\"backup\",state=\"done\"} 1",
            "kagami_backup_last_success_timestamp_seconds{vm=\"mail\"}",
            "kagami_cut_hold_seconds_bucket",
        ] {
            assert!(text.contains(wanted), "{wanted} is not in\n{text}");
        }
    }
}
