//! VMs whose writes find no room while a backup of them is under way: they are held, shown, and told of.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use serde_json::json;
use vm::Vm;
use vmdisk::HoldsWhenFull;

use super::Store;

/// How soon it is noticed that a VM is held, or goes on.
const NOTICE: Duration = Duration::from_millis(250);

/// While this lives, writes of a VM that find no room wait for some.
pub(super) struct RoomWatch {
    ended: Rc<Cell<bool>>,
    _holds: Vec<HoldsWhenFull>,
}

impl Drop for RoomWatch {
    fn drop(&mut self) {
        self.ended.set(true);
    }
}

impl Store {
    /// From now on writes of this VM that find no room wait; whoever listens to events hears of it.
    pub(super) fn watch_room(&self, vm: &Rc<Vm>) -> RoomWatch {
        let ended = Rc::new(Cell::new(false));
        let holds = vm.disks().iter().map(|open| open.disk.hold_when_full()).collect();
        // The watcher holds nothing of the VM while it sleeps: who closes the VM must not have to wait for it.
        let (name, vm) = (vm.name.clone(), Rc::downgrade(vm));
        let (over, events) = (Rc::clone(&ended), self.events.clone());
        drop(lane::spawn(async move {
            let mut was_held = false;
            loop {
                let last = over.get();
                let disks = vm.upgrade().filter(|_| !last).map_or_else(Vec::new, |vm| vm.disks());
                let held = disks.into_iter().filter(|open| open.disk.held().is_some());
                let held: Vec<String> = held.map(|open| open.slot.to_string()).collect();
                if held.is_empty() == was_held {
                    was_held = !held.is_empty();
                    let kind = if was_held { "vm.held" } else { "vm.resumed" };
                    events.tell(kind, &json!({"vm": name, "disks": held, "why": "no room"}));
                }
                if last {
                    return;
                }
                lane::sleep(NOTICE).await;
            }
        }));
        RoomWatch { ended, _holds: holds }
    }

    /// Disks are about to be closed: nobody waits for room any more.
    pub(super) fn hold_no_more(&self, vms: &[Rc<Vm>]) {
        for open in vms.iter().flat_map(|vm| vm.disks()) {
            open.disk.hold_no_more();
        }
    }
}
