//! New identities for a copy of a VM (semantics chapters 13 and 16, R59): a restored or deployed VM is another VM.
//!
//! Fresh are `uuid.bios`, `uuid.location`, every generated MAC address and the VM generation id (which tells Windows
//! domain controllers that time went back). Disk uuids and LUN identities are given where the disks are made.

use uuid::Uuid;

use crate::vmx::Vmx;

/// Keys that belong to one host or one past run; a copy has none of them.
const LEFT_BEHIND: [&str; 7] = [
    "vc.uuid",
    "migrate.hostlog",
    "migrate.migrationId",
    "sched.swap.derivedName",
    "checkpoint.vmState",
    "uuid.action",
    "vmotion.checkpointFBSize",
];

/// A uuid as VMX files write it: `56 4d 11 22 33 44 55 66-77 88 99 aa bb cc dd ee`.
pub fn vmx_uuid(uuid: Uuid) -> String {
    let hex: Vec<String> = uuid.as_bytes().iter().map(|b| format!("{b:02x}")).collect();
    format!("{}-{}", hex[..8].join(" "), hex[8..].join(" "))
}

/// Gives `vmx` a new identity and name. `fresh` is drawn by the caller, so that tests can replay it; everything else
/// follows from it.
pub fn renew(vmx: &mut Vmx, name: &str, fresh: Uuid) {
    vmx.set("displayName", name);
    vmx.set("uuid.bios", &vmx_uuid(fresh));
    vmx.set("uuid.location", &vmx_uuid(fresh));
    let (high, low) = fresh.as_u64_pair();
    // A digest of the uuid, so that neither half repeats bytes that are visible elsewhere.
    let mixed = (high ^ low.rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    vmx.set("vm.genid", &(mixed as i64).to_string());
    vmx.set("vm.genidX", &((mixed ^ low) as i64).to_string());
    for key in LEFT_BEHIND {
        vmx.remove(key);
    }
    for (adapter, offset) in generated_adapters(vmx) {
        let mac = generated_mac(fresh, offset);
        vmx.set(&format!("{adapter}.generatedAddress"), &mac);
        vmx.set(&format!("{adapter}.generatedAddressOffset"), &offset.to_string());
    }
}

/// Network adapters whose address is generated, with their offsets (10 apart, as ESX numbers them).
fn generated_adapters(vmx: &Vmx) -> Vec<(String, u32)> {
    let mut out: Vec<(String, u32)> = Vec::new();
    for (key, _) in vmx.entries() {
        let Some((adapter, _)) = key.split_once('.') else { continue };
        let lower = adapter.to_ascii_lowercase();
        let Some(number) = lower.strip_prefix("ethernet").and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        let kind = vmx.get(&format!("{lower}.addressType")).unwrap_or("generated");
        if number < 10 && !kind.eq_ignore_ascii_case("static") && !out.iter().any(|(a, _)| *a == lower) {
            out.push((lower, number * 10));
        }
    }
    out
}

/// 00:0c:29 and the last three bytes of the uuid, moved by the adapter's offset: how ESX makes them.
fn generated_mac(uuid: Uuid, offset: u32) -> String {
    let tail = &uuid.as_bytes()[13..];
    let number = u32::from_be_bytes([0, tail[0], tail[1], tail[2]]).wrapping_add(offset) & 0xff_ffff;
    let [_, a, b, c] = number.to_be_bytes();
    format!("00:0c:29:{a:02x}:{b:02x}:{c:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r59_a_copy_is_another_machine() {
        let text = "displayName = \"sql\"\nuuid.bios = \"56 4d 00\"\nvc.uuid = \"x\"\n\
            ethernet0.present = \"TRUE\"\nethernet0.addressType = \"generated\"\n\
            ethernet0.generatedAddress = \"00:0c:29:01:02:03\"\nEthernet1.addressType = \"static\"\n\
            ethernet1.address = \"00:50:56:00:00:01\"\nmemsize = \"512\"\n";
        let mut vmx = Vmx::parse(text.as_bytes()).unwrap();
        let fresh = Uuid::from_u128(0x564d_0102_0304_0506_0708_090a_0bff_fffe);
        renew(&mut vmx, "sql-restored", fresh);
        assert_eq!(vmx.get("displayName"), Some("sql-restored"));
        assert_eq!(vmx.get("uuid.bios"), Some("56 4d 01 02 03 04 05 06-07 08 09 0a 0b ff ff fe"));
        assert_eq!(vmx.get("ethernet0.generatedAddress"), Some("00:0c:29:ff:ff:fe"));
        assert_eq!(
            vmx.get("ethernet1.address"),
            Some("00:50:56:00:00:01"),
            "a static address is the owner's"
        );
        assert_eq!(vmx.get("ethernet1.generatedAddress"), None);
        assert_eq!(vmx.get("vc.uuid"), None);
        assert_eq!(vmx.get("memsize"), Some("512"));
        let first = vmx.get("vm.genid").map(str::to_owned);
        renew(&mut vmx, "again", Uuid::from_u128(7));
        assert_ne!(vmx.get("vm.genid").map(str::to_owned), first);
    }
}
