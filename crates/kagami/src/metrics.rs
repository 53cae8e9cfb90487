//! Prometheus metrics: counters that live here, and gauges that are asked from the store at each scrape.

use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
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
    pub fn cut_held(&self, seconds: f64) {
        self.cut_hold.observe(seconds);
    }

    /// The text for a scrape, with these objects as they are now.
    pub fn render(
        &self,
        pools: &[PoolView],
        luns: &[LunView],
        datastores: &[DatastoreView],
        vms: &[VmView],
    ) -> String {
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
        metrics.cut_held(0.001);
        let text = metrics.render(&[], &[], &[], &[]);
        for wanted in [
            "kagami_build_info{version=",
            "kagami_jobs_total{kind=\"backup\",state=\"done\"} 1",
            "kagami_backup_last_success_timestamp_seconds{vm=\"mail\"}",
            "kagami_cut_hold_seconds_bucket",
        ] {
            assert!(text.contains(wanted), "{wanted} is not in\n{text}");
        }
    }
}
