//! Where a disk is plugged in: `scsi0:1`, `ide1:0`.

use std::fmt;
use std::str::FromStr;

/// Kind of adapter.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Bus {
    /// `scsi0` to `scsi3`, units 0 to 15 without 7 (the adapter itself).
    Scsi,
    /// `ide0` and `ide1`, units 0 and 1.
    Ide,
}

/// A place for a disk in a VM.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slot {
    bus: Bus,
    adapter: u8,
    unit: u8,
}

/// Not a slot of a VM.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("\"{0}\" is no slot: scsi0:0 to scsi3:15 without unit 7, or ide0:0 to ide1:1")]
pub struct SlotError(pub String);

impl Slot {
    /// The slot at these numbers, if a VM has it.
    pub fn new(bus: Bus, adapter: u8, unit: u8) -> Option<Self> {
        let fits = match bus {
            Bus::Scsi => adapter < 4 && unit < 16 && unit != 7,
            Bus::Ide => adapter < 2 && unit < 2,
        };
        fits.then_some(Self { bus, adapter, unit })
    }

    /// All SCSI slots in order: 4 adapters of 15 units.
    pub fn all_scsi() -> impl Iterator<Item = Self> {
        (0..4).flat_map(|adapter| (0..16).filter_map(move |unit| Self::new(Bus::Scsi, adapter, unit)))
    }

    /// Name of its adapter, as in `scsi0.present`.
    pub fn adapter_name(&self) -> String {
        let bus = match self.bus {
            Bus::Scsi => "scsi",
            Bus::Ide => "ide",
        };
        format!("{bus}{}", self.adapter)
    }

    /// Kind of adapter.
    pub fn bus(&self) -> Bus {
        self.bus
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.adapter_name(), self.unit)
    }
}

impl FromStr for Slot {
    type Err = SlotError;
    fn from_str(text: &str) -> Result<Self, SlotError> {
        let parse = || {
            let lower = text.to_ascii_lowercase();
            let (bus, rest) = match lower.strip_prefix("scsi") {
                Some(rest) => (Bus::Scsi, rest),
                None => (Bus::Ide, lower.strip_prefix("ide")?),
            };
            let (adapter, unit) = rest.split_once(':')?;
            let digits = |s: &str| (!s.is_empty() && s.bytes().all(|b| b.is_ascii_digit())).then_some(());
            digits(adapter).and(digits(unit))?;
            Self::new(bus, adapter.parse().ok()?, unit.parse().ok()?)
        };
        parse().ok_or_else(|| SlotError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixty_scsi_slots_and_four_ide() {
        assert_eq!(Slot::all_scsi().count(), 60);
        for text in ["scsi0:0", "scsi3:15", "ide1:1", "scsi2:8"] {
            assert_eq!(text.parse::<Slot>().unwrap().to_string(), text);
        }
        for text in ["scsi0:7", "scsi4:0", "ide0:2", "scsi0", "scsi0:+1", "sata0:0", "scsi:1", "scsi0:16"] {
            assert_eq!(text.parse::<Slot>(), Err(SlotError(text.to_owned())));
        }
        assert_eq!("SCSI1:2".parse::<Slot>().unwrap().adapter_name(), "scsi1");
    }
}
