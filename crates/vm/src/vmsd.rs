//! The snapshot catalogue `.vmsd` (semantics page, chapter 6; R20).
//!
//! Real catalogues are dirty: counts that do not fit, records with the same uid. All records are read and the
//! differences reported; the file chain and its CIDs decide, the catalogue never does.

use std::collections::{BTreeMap, BTreeSet};

use crate::vmx::{Vmx, VmxError};

/// Most records that are looked at; ESX allows 32 levels, real trees have a few dozen.
pub const MAX_RECORDS: usize = 4096;

/// One `snapshotN` record.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Record {
    /// N: its place in the file, not its identity.
    pub number: u32,
    /// Identity within the VM; absent in torn files.
    pub uid: Option<u32>,
    /// uid of the snapshot before it; absent for the first.
    pub parent: Option<u32>,
    /// The `.vmsn` state file.
    pub file_name: String,
    /// What the user called it.
    pub display_name: String,
    /// What the user wrote about it.
    pub description: String,
    /// Microseconds since 1970.
    pub created_us: Option<u64>,
    /// The files that were **frozen** by it (not the deltas that took over), by node (`scsi0:0`).
    pub disks: Vec<FrozenDisk>,
}

/// A disk in a record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrozenDisk {
    /// Slot as text, as the file has it.
    pub node: String,
    /// Descriptor that was frozen.
    pub file_name: String,
}

/// Something in the catalogue that does not fit (R20). Never a reason to delete a file.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Difference {
    /// `snapshot.numSnapshots` against the records that are there.
    #[error("numSnapshots says {says}, {found} records are there")]
    Count {
        /// What the file says.
        says: u32,
        /// What is there.
        found: u32,
    },
    /// Two records with one uid.
    #[error("uid {0} is used by several records")]
    UidTwice(u32),
    /// A record without uid.
    #[error("snapshot{0} has no uid")]
    NoUid(u32),
    /// `snapshot.current` or a parent names a uid that no record has.
    #[error("{by} names uid {uid}, which no record has")]
    NoSuchUid {
        /// Who names it.
        by: String,
        /// The uid.
        uid: u32,
    },
    /// `numDisks` against the disks that are there.
    #[error("snapshot{number} says {says} disks, {found} are there")]
    Disks {
        /// Which record.
        number: u32,
        /// What it says.
        says: u32,
        /// What is there.
        found: u32,
    },
    /// Following parents comes back to where it began.
    #[error("the parents of uid {0} form a circle")]
    Circle(u32),
    /// More records than [`MAX_RECORDS`]; the rest was not looked at.
    #[error("more than {MAX_RECORDS} records; the rest was not looked at")]
    TooMany,
}

/// A catalogue in memory.
#[derive(Clone, Debug, Default)]
pub struct Vmsd {
    file: Vmx,
    /// All records, also those that contradict each other, by number.
    pub records: Vec<Record>,
    /// What does not fit.
    pub differences: Vec<Difference>,
}

impl Vmsd {
    /// Reads a file; an empty one is an empty catalogue.
    pub fn parse(bytes: &[u8]) -> Result<Self, VmxError> {
        let file = Vmx::parse(bytes)?;
        let mut differences = Vec::new();
        let mut found: BTreeMap<u32, Record> = BTreeMap::new();
        let mut disks: BTreeMap<(u32, u32), FrozenDisk> = BTreeMap::new();
        let mut said: BTreeMap<u32, u32> = BTreeMap::new();
        let mut times: BTreeMap<u32, (Option<u32>, Option<u32>)> = BTreeMap::new();
        for (key, value) in file.entries() {
            let Some((number, field)) = numbered(key, "snapshot") else { continue };
            if !found.contains_key(&number) && found.len() == MAX_RECORDS {
                if differences.last() != Some(&Difference::TooMany) {
                    differences.push(Difference::TooMany);
                }
                continue;
            }
            let record = found.entry(number).or_insert_with(|| Record { number, ..Record::default() });
            match field.to_ascii_lowercase().as_str() {
                "uid" => record.uid = value.parse().ok(),
                "parent" => record.parent = value.parse().ok(),
                "filename" => value.clone_into(&mut record.file_name),
                "displayname" => value.clone_into(&mut record.display_name),
                "description" => value.clone_into(&mut record.description),
                "createtimehigh" => times.entry(number).or_default().0 = wrapped(value),
                "createtimelow" => times.entry(number).or_default().1 = wrapped(value),
                "numdisks" => drop(value.parse().map(|n: u32| said.insert(number, n))),
                _ => {
                    if let Some((disk, field)) = numbered(field, "disk") {
                        let empty = || FrozenDisk { node: String::new(), file_name: String::new() };
                        let entry = disks.entry((number, disk)).or_insert_with(empty);
                        match field.to_ascii_lowercase().as_str() {
                            "filename" => value.clone_into(&mut entry.file_name),
                            "node" => value.clone_into(&mut entry.node),
                            _ => {}
                        }
                    }
                }
            }
        }
        for ((number, _), disk) in disks {
            if let Some(record) = found.get_mut(&number) {
                record.disks.push(disk);
            }
        }
        for (number, (high, low)) in times {
            if let (Some(record), Some(high), Some(low)) = (found.get_mut(&number), high, low) {
                record.created_us = Some(u64::from(high) << 32 | u64::from(low));
            }
        }
        let mut whole = Self { file, records: found.into_values().collect(), differences };
        whole.compare(&said);
        Ok(whole)
    }

    /// Notes everything that does not fit.
    fn compare(&mut self, disks_said: &BTreeMap<u32, u32>) {
        let mut out = std::mem::take(&mut self.differences);
        let found = self.records.len() as u32;
        if let Some(says) = self.number("snapshot.numSnapshots")
            && says != found
        {
            out.push(Difference::Count { says, found });
        }
        let (mut uids, mut twice) = (BTreeSet::new(), BTreeSet::new());
        for record in &self.records {
            match record.uid {
                None => out.push(Difference::NoUid(record.number)),
                Some(uid) if !uids.insert(uid) && twice.insert(uid) => out.push(Difference::UidTwice(uid)),
                Some(_) => {}
            }
            let there = record.disks.len() as u32;
            if let Some(says) = disks_said.get(&record.number)
                && *says != there
            {
                out.push(Difference::Disks { number: record.number, says: *says, found: there });
            }
        }
        let mut names: Vec<(String, u32)> =
            self.current().map(|uid| ("snapshot.current".to_owned(), uid)).into_iter().collect();
        names.extend(
            self.records.iter().filter_map(|r| Some((format!("snapshot{}.parent", r.number), r.parent?))),
        );
        for (by, uid) in names {
            // A parent of 0 is how some versions write "none".
            if !uids.contains(&uid) && uid != 0 {
                out.push(Difference::NoSuchUid { by, uid });
            }
        }
        for uid in &uids {
            if self.path(*uid).is_none() {
                out.push(Difference::Circle(*uid));
            }
        }
        self.differences = out;
    }

    fn number(&self, key: &str) -> Option<u32> {
        self.file.get(key)?.parse().ok()
    }

    /// uid of the snapshot that the VM runs on top of.
    pub fn current(&self) -> Option<u32> {
        self.number("snapshot.current").filter(|uid| *uid != 0)
    }

    /// The record with a uid; the last one when several have it.
    pub fn by_uid(&self, uid: u32) -> Option<&Record> {
        self.records.iter().rev().find(|r| r.uid == Some(uid))
    }

    /// uids from the first snapshot to this one; `None` when the parents run in a circle.
    pub fn path(&self, uid: u32) -> Option<Vec<u32>> {
        let mut path = vec![uid];
        while let Some(parent) = path.last().and_then(|uid| self.by_uid(*uid)).and_then(|r| r.parent) {
            if path.contains(&parent) {
                return None;
            }
            path.push(parent);
        }
        path.reverse();
        Some(path)
    }

    /// Adds a snapshot as the current one and returns its uid. Existing lines stay as they are, dirty ones too.
    pub fn add(&mut self, display_name: &str, file_name: &str, created_us: u64, disks: &[FrozenDisk]) -> u32 {
        let last = self.number("snapshot.lastUID").unwrap_or(0);
        let uid = self.records.iter().filter_map(|r| r.uid).max().unwrap_or(0).max(last) + 1;
        let number = self.records.iter().map(|r| r.number + 1).max().unwrap_or(0);
        let record = Record {
            number,
            uid: Some(uid),
            parent: self.current(),
            file_name: file_name.to_owned(),
            display_name: display_name.to_owned(),
            description: String::new(),
            created_us: Some(created_us),
            disks: disks.to_vec(),
        };
        self.write(&record);
        self.file.set("snapshot.lastUID", &uid.to_string());
        self.file.set("snapshot.current", &uid.to_string());
        self.file.set("snapshot.numSnapshots", &(self.records.len() + 1).to_string());
        self.records.push(record);
        uid
    }

    fn write(&mut self, record: &Record) {
        let prefix = format!("snapshot{}", record.number);
        let mut set = |field: &str, value: &str| self.file.set(&format!("{prefix}.{field}"), value);
        set("uid", &record.uid.unwrap_or(0).to_string());
        set("filename", &record.file_name);
        if let Some(parent) = record.parent {
            set("parent", &parent.to_string());
        }
        set("displayName", &record.display_name);
        set("description", &record.description);
        set("type", "0");
        let time = record.created_us.unwrap_or(0);
        set("createTimeHigh", &(time >> 32).to_string());
        // ESX writes the low half as a signed number.
        set("createTimeLow", &((time & u64::from(u32::MAX)) as u32).cast_signed().to_string());
        set("numDisks", &record.disks.len().to_string());
        for (index, disk) in record.disks.iter().enumerate() {
            set(&format!("disk{index}.fileName"), &disk.file_name);
            set(&format!("disk{index}.node"), &disk.node);
        }
    }

    /// Takes a snapshot out of the catalogue: its children get its parent. False when no record has that uid.
    pub fn remove(&mut self, uid: u32) -> bool {
        let Some(gone) = self.by_uid(uid).cloned() else { return false };
        let parent = gone.parent.map_or_else(|| "0".to_owned(), |p| p.to_string());
        for record in &mut self.records {
            if record.parent == Some(uid) {
                record.parent = gone.parent;
                let key = format!("snapshot{}.parent", record.number);
                match gone.parent {
                    Some(_) => self.file.set(&key, &parent),
                    None => drop(self.file.remove(&key)),
                }
            }
        }
        if self.current() == Some(uid) {
            self.file.set("snapshot.current", &parent);
        }
        self.records.retain(|r| r.number != gone.number);
        self.file.remove_prefix(&format!("snapshot{}.", gone.number));
        self.file.set("snapshot.numSnapshots", &self.records.len().to_string());
        true
    }

    /// The file.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.file.to_bytes()
    }
}

/// `wordN.rest` to (N, rest).
fn numbered<'a>(key: &'a str, word: &str) -> Option<(u32, &'a str)> {
    let (head, rest) = key.split_once('.')?;
    let digits = head.get(word.len()..)?;
    if !head.get(..word.len())?.eq_ignore_ascii_case(word) || digits.is_empty() {
        return None;
    }
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())?.map(|n| (n, rest))
}

/// A 32-bit number that may have been written as a signed one.
fn wrapped(value: &str) -> Option<u32> {
    value.parse::<u32>().ok().or_else(|| value.parse::<i32>().ok().map(i32::cast_unsigned))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As in the real file that the semantics page cites: numSnapshots 1, three records, two with one uid.
    const DIRTY: &str = ".encoding = \"UTF-8\"\nsnapshot.lastUID = \"3\"\nsnapshot.numSnapshots = \"1\"\n\
        snapshot.current = \"3\"\nsnapshot0.uid = \"2\"\nsnapshot0.filename = \"a-Snapshot2.vmsn\"\n\
        snapshot0.createTimeHigh = \"308852\"\nsnapshot0.createTimeLow = \"1104348378\"\n\
        snapshot0.numDisks = \"2\"\nsnapshot0.disk0.fileName = \"a.vmdk\"\nsnapshot0.disk0.node = \"scsi0:0\"\n\
        snapshot1.uid = \"3\"\nsnapshot1.parent = \"2\"\nsnapshot2.uid = \"3\"\nsnapshot2.parent = \"9\"\n";

    #[test]
    fn r20_dirty_files_are_read_whole_and_reported() {
        let vmsd = Vmsd::parse(DIRTY.as_bytes()).unwrap();
        assert_eq!(vmsd.records.len(), 3);
        assert_eq!(vmsd.records[0].disks[0].file_name, "a.vmdk");
        // 14 January 2012 (semantics page, chapter 6).
        assert_eq!(vmsd.records[0].created_us, Some(308_852 * (1 << 32) + 1_104_348_378));
        let time = jiff::Timestamp::from_microsecond(vmsd.records[0].created_us.unwrap() as i64).unwrap();
        assert!(time.to_string().starts_with("2012-01-14"), "{time}");
        assert!(vmsd.differences.contains(&Difference::Count { says: 1, found: 3 }));
        assert!(vmsd.differences.contains(&Difference::UidTwice(3)));
        assert!(vmsd.differences.contains(&Difference::Disks { number: 0, says: 2, found: 1 }));
        let by = "snapshot2.parent".to_owned();
        assert!(vmsd.differences.contains(&Difference::NoSuchUid { by, uid: 9 }));
        assert_eq!(vmsd.to_bytes(), DIRTY.as_bytes());
    }

    #[test]
    fn circles_are_noticed() {
        let text = "snapshot0.uid = \"1\"\nsnapshot0.parent = \"2\"\nsnapshot1.uid = \"2\"\nsnapshot1.parent = \"1\"\n";
        let vmsd = Vmsd::parse(text.as_bytes()).unwrap();
        assert!(vmsd.differences.contains(&Difference::Circle(1)));
        assert_eq!(vmsd.path(1), None);
    }

    #[test]
    fn add_and_remove() {
        let mut vmsd = Vmsd::parse(b"").unwrap();
        let disk = FrozenDisk { node: "scsi0:0".into(), file_name: "a.vmdk".into() };
        let time = 1_700_000_000_999_999; // its low half is negative as a signed number or not: both must come back
        let first = vmsd.add("one", "a-1.vmsn", time, std::slice::from_ref(&disk));
        let second = vmsd.add("two", "a-2.vmsn", time + (1 << 31), &[disk]);
        let again = Vmsd::parse(&vmsd.to_bytes()).unwrap();
        assert_eq!(again.records, vmsd.records);
        assert_eq!(again.differences, []);
        assert_eq!((again.current(), again.path(second)), (Some(second), Some(vec![first, second])));
        assert!(vmsd.remove(first));
        let again = Vmsd::parse(&vmsd.to_bytes()).unwrap();
        assert_eq!((again.differences.as_slice(), again.path(second)), (&[][..], Some(vec![second])));
        assert!(!vmsd.remove(first));
    }
}
