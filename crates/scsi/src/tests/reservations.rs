//! Persistent reservations: the cases of SPC-4 clause 5.12 one by one, and all of them against a model.

use super::admission::{keys, prout};
use super::*;
use block::{DiskError, Io, Safe, Sector};
use proptest::prelude::*;

use crate::Keep;
use crate::pr::Kind;
use crate::sense::asc;

fn prin(action: u8) -> Vec<u8> {
    vec![0x5e, action, 0, 0, 0, 0, 0, 0xff, 0xff, 0]
}

async fn generation(nexus: &Rc<Nexus>) -> u32 {
    u32::from_be_bytes(get(nexus, &prin(0)).await[..4].try_into().unwrap())
}

/// Key and type of the reservation.
async fn held(nexus: &Rc<Nexus>) -> Option<(u64, u8)> {
    let data = get(nexus, &prin(1)).await;
    match data[7] {
        0 => None,
        16 => Some((u64::from_be_bytes(data[8..16].try_into().unwrap()), data[21])),
        n => panic!("additional length {n}"),
    }
}

async fn registered(nexus: &Rc<Nexus>) -> Vec<u64> {
    let data = get(nexus, &prin(0)).await;
    assert_eq!(u32::from_be_bytes(data[4..8].try_into().unwrap()) as usize, data.len() - 8);
    data[8..].chunks(8).map(|k| u64::from_be_bytes(k.try_into().unwrap())).collect()
}

#[test]
fn registering_spc4_table_46() {
    lane::block_on(async {
        let bench = Bench::new();
        let (one, two) = (bench.nexus(1), bench.nexus(2));
        conflict(&one, &prout(0, 0), &keys(9, 1, 0)).await;
        put(&one, &prout(0, 0), &keys(0, 0, 0)).await;
        assert_eq!((registered(&one).await, generation(&one).await), (vec![], 0));
        put(&one, &prout(0, 0), &keys(0, 1, 0)).await;
        put(&two, &prout(6, 0), &keys(77, 1, 0)).await;
        assert_eq!((registered(&one).await, generation(&one).await), (vec![1, 1], 2));
        conflict(&one, &prout(0, 0), &keys(0, 5, 0)).await;
        put(&one, &prout(0, 0), &keys(1, 5, 0)).await;
        put(&one, &prout(6, 0), &keys(0, 6, 0)).await;
        assert_eq!((registered(&one).await, generation(&one).await), (vec![6, 1], 4));
        put(&one, &prout(0, 0), &keys(6, 0, 0)).await;
        put(&two, &prout(6, 0), &keys(0, 0, 0)).await;
        assert_eq!((registered(&one).await, generation(&one).await), (vec![], 6));
        let wrong = Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR);
        refused(&one, &[0x5f, 0, 0, 0, 0, 0, 0, 0, 23, 0], &[0; 23], wrong).await;
        refused(&one, &prout(0, 0), &[0; 20], wrong).await;
        refused(&one, &[0x5f, 8, 0, 0, 0, 0, 0, 0, 24, 0], &[0; 24], Sense::cdb(1, Some(4))).await;
    });
}

#[test]
fn reserving_and_releasing_spc4_5_12_9_to_11() {
    lane::block_on(async {
        for kind in Kind::ALL {
            let bench = Bench::new();
            let (one, two) = (bench.nexus(1), bench.nexus(2));
            let code = kind as u8;
            conflict(&one, &prout(1, code), &keys(1, 0, 0)).await;
            put(&one, &prout(0, 0), &keys(0, 1, 0)).await;
            put(&two, &prout(0, 0), &keys(0, 2, 0)).await;
            conflict(&one, &prout(1, code), &keys(2, 0, 0)).await;
            put(&one, &prout(2, code), &keys(1, 0, 0)).await;
            put(&one, &prout(1, code), &keys(1, 0, 0)).await;
            put(&one, &prout(1, code), &keys(1, 0, 0)).await;
            let all = kind.all_registrants();
            assert_eq!(held(&two).await, Some((if all { 0 } else { 1 }, code)));
            let (reply, _) = run(&two, &prout(1, code), &keys(2, 0, 0), 0).await;
            let expected = if all { Status::Good } else { Status::ReservationConflict };
            assert_eq!(reply.status, expected, "{kind:?}: everybody holds it, or one");
            let other = if code == 1 { 3 } else { 1 };
            conflict(&one, &prout(1, other), &keys(1, 0, 0)).await;
            let invalid = Sense::illegal(asc::INVALID_RELEASE_OF_PERSISTENT_RESERVATION);
            refused(&one, &prout(2, other), &keys(1, 0, 0), invalid).await;
            conflict(&one, &prout(2, code), &keys(2, 0, 0)).await;
            if !all {
                put(&two, &prout(2, code), &keys(2, 0, 0)).await;
                assert!(held(&two).await.is_some(), "the release of one who holds nothing does nothing");
            }
            assert_eq!(generation(&one).await, 2, "neither RESERVE nor RELEASE counts");
            put(&one, &prout(2, code), &keys(1, 0, 0)).await;
            assert_eq!(held(&one).await, None);
            let told = kind.for_registrants().then_some(asc::RESERVATIONS_RELEASED);
            assert_eq!((attention(&one).await, attention(&two).await), (None, told));
        }
    });
}

#[test]
fn unregistering_the_holder_spc4_5_12_11_2_1() {
    lane::block_on(async {
        for kind in Kind::ALL {
            let bench = Bench::new();
            let (one, two) = (bench.nexus(1), bench.nexus(2));
            put(&one, &prout(0, 0), &keys(0, 1, 0)).await;
            put(&two, &prout(0, 0), &keys(0, 2, 0)).await;
            put(&one, &prout(1, kind as u8), &keys(1, 0, 0)).await;
            put(&one, &prout(0, 0), &keys(1, 0, 0)).await;
            assert_eq!(held(&one).await.is_some(), kind.all_registrants(), "{kind:?}");
            let only = kind.for_registrants() && !kind.all_registrants();
            let told = only.then_some(asc::RESERVATIONS_RELEASED);
            assert_eq!(attention(&two).await, told, "{kind:?}");
            put(&two, &prout(0, 0), &keys(2, 0, 0)).await;
            assert_eq!(held(&two).await, None, "with the last registrant");
        }
    });
}

#[test]
fn clear_spc4_5_12_11_2_6() {
    lane::block_on(async {
        let bench = Bench::new();
        let (one, two) = (bench.nexus(1), bench.nexus(2));
        put(&one, &prout(0, 0), &keys(0, 1, 0)).await;
        put(&two, &prout(0, 0), &keys(0, 2, 0)).await;
        put(&one, &prout(1, 3), &keys(1, 0, 0)).await;
        conflict(&two, &prout(3, 0), &keys(1, 0, 0)).await;
        put(&two, &prout(3, 0), &keys(2, 0, 0)).await;
        assert_eq!((registered(&two).await, held(&two).await, generation(&two).await), (vec![], None, 3));
        assert_eq!(attention(&one).await, Some(asc::RESERVATIONS_PREEMPTED));
        assert_eq!(attention(&two).await, None);
    });
}

#[test]
fn preempting_spc4_5_12_11_2_3() {
    lane::block_on(async {
        let bench = Bench::new();
        let nexuses: Vec<_> = (1..=4).map(|n| bench.nexus(n)).collect();
        let [one, two, three, four] = &nexuses[..] else { panic!() };
        for (nexus, key) in [(one, 1), (two, 2), (three, 3), (four, 3)] {
            put(nexus, &prout(0, 0), &keys(0, key, 0)).await;
        }
        // Without a reservation: registrations go.
        refused(one, &prout(4, 1), &keys(1, 0, 0), Sense::parameter(8, None)).await;
        conflict(one, &prout(4, 1), &keys(1, 9, 0)).await;
        conflict(one, &prout(4, 1), &keys(2, 3, 0)).await;
        put(one, &prout(4, 1), &keys(1, 3, 0)).await;
        assert_eq!((registered(one).await, generation(one).await), (vec![1, 2], 5));
        for nexus in [three, four] {
            assert_eq!(attention(nexus).await, Some(asc::REGISTRATIONS_PREEMPTED));
        }
        // The holder's key: the reservation goes over, with the type asked for.
        put(three, &prout(0, 0), &keys(0, 3, 0)).await;
        put(two, &prout(1, 5), &keys(2, 0, 0)).await;
        put(one, &prout(4, 6), &keys(1, 2, 0)).await;
        assert_eq!((registered(one).await, held(one).await), (vec![1, 3], Some((1, 6))));
        assert_eq!(attention(two).await, Some(asc::REGISTRATIONS_PREEMPTED));
        assert_eq!(attention(three).await, Some(asc::RESERVATIONS_RELEASED), "the type is another");
        // Another's key: the reservation stays.
        put(one, &prout(4, 1), &keys(1, 3, 0)).await;
        assert_eq!((registered(one).await, held(one).await), (vec![1], Some((1, 6))));
        // Itself: keeps its registration, and takes the type.
        put(one, &prout(4, 7), &keys(1, 1, 0)).await;
        assert_eq!((registered(one).await, held(one).await), (vec![1], Some((0, 7))));
        // All registrants: key zero takes everything, another key one registration.
        attention(three).await;
        put(two, &prout(0, 0), &keys(0, 2, 0)).await;
        put(three, &prout(0, 0), &keys(0, 3, 0)).await;
        put(two, &prout(4, 8), &keys(2, 3, 0)).await;
        assert_eq!((registered(one).await, held(one).await), (vec![1, 2], Some((0, 7))));
        put(two, &prout(4, 3), &keys(2, 0, 0)).await;
        assert_eq!((registered(two).await, held(two).await), (vec![2], Some((2, 3))));
        refused(two, &prout(4, 9), &keys(2, 2, 0), Sense::cdb(2, Some(3))).await;
        refused(two, &prout(4, 0x13), &keys(2, 2, 0), Sense::cdb(2, Some(7))).await;
    });
}

#[test]
fn r50_further_initiators_and_all_ports() {
    lane::block_on(async {
        let bench = Bench::new();
        let one = bench.nexus(1);
        let second = LunMap::new(port(2));
        second.add(0, Rc::clone(&bench.unit) as _);
        let ids = [initiator(2).to_bytes(), initiator(3).to_bytes()].concat();
        let list = [keys(0, 1, 0x0c), (ids.len() as u32).to_be_bytes().to_vec(), ids].concat();
        let cdb = |length: usize| vec![0x5f, 0, 0, 0, 0, 0, 0, 0, length as u8, 0];
        put(&one, &cdb(list.len()), &list).await;
        assert_eq!(registered(&one).await, [1; 6], "three initiators at two ports");
        let status = get(&one, &prin(3)).await;
        let mut rest = &status[8..];
        let mut seen = Vec::new();
        while !rest.is_empty() {
            let length = u32::from_be_bytes(rest[20..24].try_into().unwrap()) as usize;
            let (id, used) = TransportId::parse(&rest[24..24 + length]).unwrap();
            assert_eq!((used, rest[12]), (length, 2), "ALL_TG_PT, not the holder");
            seen.push((id, rest[19]));
            rest = &rest[24 + length..];
        }
        assert_eq!(seen.len(), 6);
        for n in 1..4 {
            assert!(seen.contains(&(initiator(n), 1)) && seen.contains(&(initiator(n), 2)));
        }
        // The same initiator through the other port is registered, and another nexus.
        let far = Nexus::new(initiator(2), second);
        assert_eq!(attention(&far).await, Some(asc::POWER_ON));
        put(&far, &prout(1, 3), &keys(1, 0, 0)).await;
        conflict(&bench.nexus(2), &cdb10(0x28, 0, 0, 1), &[]).await;
        get(&far, &cdb10(0x28, 0, 0, 1)).await;
        // Not of one that is registered; not of a list that is cut off.
        let again = [keys(1, 1, 0x08), vec![0; 4]].concat();
        refused(&one, &cdb(28), &again, Sense::parameter(20, Some(3))).await;
        let wrong = Sense::illegal(asc::PARAMETER_LIST_LENGTH_ERROR);
        refused(&one, &cdb(28), &list[..28], wrong).await;
        assert_eq!(get(&one, &prin(2)).await, [0, 8, 0x1d, 0x80, 0xea, 1, 0, 0]);
    });
}

fn moving(key: u64, new: u64, flags: u8, port: u16, to: &TransportId) -> Vec<u8> {
    let id = to.to_bytes();
    let mut list = keys(key, new, 0);
    list[17] = flags;
    list[18..20].copy_from_slice(&port.to_be_bytes());
    list[20..24].copy_from_slice(&(id.len() as u32).to_be_bytes());
    [list, id].concat()
}

#[test]
fn register_and_move_spc4_5_12_8() {
    lane::block_on(async {
        let bench = Bench::new();
        let (one, two) = (bench.nexus(1), bench.nexus(2));
        let list = moving(1, 22, 2, 1, &initiator(2));
        let cdb = vec![0x5f, 7, 0, 0, 0, 0, 0, 0, list.len() as u8, 0];
        put(&one, &prout(0, 0), &keys(0, 1, 0)).await;
        conflict(&one, &cdb, &list).await;
        put(&one, &prout(1, 3), &keys(1, 0, 0)).await;
        conflict(&two, &cdb, &list).await;
        refused(&one, &cdb, &moving(1, 0, 2, 1, &initiator(2)), Sense::parameter(8, None)).await;
        refused(&one, &cdb, &moving(1, 2, 2, 7, &initiator(2)), Sense::parameter(18, None)).await;
        refused(&one, &cdb, &moving(1, 2, 2, 1, &initiator(1)), Sense::parameter(24, None)).await;
        put(&one, &cdb, &list).await;
        assert_eq!((registered(&two).await, held(&two).await), (vec![22], Some((22, 3))));
        conflict(&one, &cdb10(0x28, 0, 0, 1), &[]).await;
        get(&two, &cdb10(0x28, 0, 0, 1)).await;
        put(&two, &prout(4, 7), &keys(22, 22, 0)).await;
        conflict(&two, &cdb, &moving(22, 2, 2, 1, &initiator(1))).await;
    });
}

/// Fails when told to.
struct Failing(std::cell::Cell<bool>);

impl Keep for Failing {
    fn save<'a>(&'a self, _record: &'a [u8]) -> Io<'a> {
        Box::pin(async move { if self.0.get() { Err(DiskError::NoSpace) } else { Ok(()) } })
    }
}

#[test]
fn r52_what_is_not_kept_is_not_answered_good() {
    lane::block_on(async {
        let keep = Rc::new(Failing(std::cell::Cell::new(false)));
        let disk = Rc::new(MemoryDisk::new(BLOCKS));
        let unit =
            LogicalUnit::new(disk, identity(), Settings::default(), Rc::clone(&keep) as _, &[]).unwrap();
        let luns = LunMap::new(port(1));
        luns.add(0, unit);
        let one = Nexus::new(initiator(1), luns);
        attention(&one).await;
        put(&one, &prout(0, 0), &keys(0, 1, 0)).await;
        keep.0.set(true);
        let failed = Sense::new(Key::HardwareError, asc::INTERNAL_TARGET_FAILURE);
        refused(&one, &prout(1, 3), &keys(1, 0, 0), failed).await;
        assert_eq!((held(&one).await, registered(&one).await), (None, vec![1]));
        keep.0.set(false);
        put(&one, &prout(1, 3), &keys(1, 0, 0)).await;
    });
}

#[test]
fn r52_reservations_survive_a_restart_of_the_daemon() {
    lane::block_on(async {
        let bench = Bench::new();
        let one = bench.nexus(1);
        put(&one, &prout(0, 0), &keys(0, 1, 0)).await;
        put(&one, &prout(1, 3), &keys(1, 0, 0)).await;
        let keep = Rc::clone(&bench.keep);
        drop((one, bench));
        let disk = Rc::new(MemoryDisk::new(BLOCKS));
        let record = keep.record();
        let unit = LogicalUnit::new(disk, identity(), Settings::default(), keep, &record).unwrap();
        let luns = LunMap::new(port(1));
        luns.add(0, unit);
        let (one, two) = (Nexus::new(initiator(1), Rc::clone(&luns)), Nexus::new(initiator(2), luns));
        attention(&one).await;
        attention(&two).await;
        conflict(&two, &cdb10(0x28, 0, 0, 1), &[]).await;
        get(&one, &cdb10(0x28, 0, 0, 1)).await;
        put(&one, &prout(2, 3), &keys(1, 0, 0)).await;
    });
}

#[test]
fn r53_matching_by_name_repairs_another_session_id() {
    lane::block_on(async {
        for by_name in [false, true] {
            let settings = Settings { by_name, ..Settings::default() };
            let bench = Bench::with(Rc::new(MemoryDisk::new(BLOCKS)), settings);
            let one = bench.nexus(1);
            put(&one, &prout(0, 0), &keys(0, 1, 0)).await;
            put(&one, &prout(1, 3), &keys(1, 0, 0)).await;
            one.lost().await;
            let id = TransportId::iscsi("iqn.2026-01.test:1", Some([9; 6])).unwrap();
            let again = Nexus::new(id, Rc::clone(&bench.luns));
            attention(&again).await;
            let (reply, _) = run(&again, &prout(2, 3), &keys(1, 0, 0), 0).await;
            assert_eq!(reply.status == Status::Good, by_name);
        }
    });
}

#[test]
fn a_fenced_node_is_fenced_on_block_front_ends_too() {
    lane::block_on(async {
        let bench = Bench::new();
        let (one, two) = (bench.nexus(1), bench.nexus(2));
        let nbd = bench.unit.as_disk(initiator(9), &port(3));
        let data = [5; 512];
        nbd.write(Sector(0), &Segments::new(&data), Safe::AtNextFlush).await.unwrap();
        put(&one, &prout(0, 0), &keys(0, 1, 0)).await;
        put(&two, &prout(0, 0), &keys(0, 2, 0)).await;
        put(&one, &prout(1, 5), &keys(1, 0, 0)).await;
        let write = nbd.write(Sector(0), &Segments::new(&data), Safe::AtNextFlush).await;
        assert!(matches!(write, Err(DiskError::Conflict)));
        assert!(matches!(nbd.zero(Sector(0), 1, true).await, Err(DiskError::Conflict)));
        assert!(matches!(nbd.unmap(Sector(0), 1).await, Err(DiskError::Conflict)));
        let both = nbd.compare_and_write(Sector(0), &Segments::new(&data), &Segments::new(&data)).await;
        assert!(matches!(both, Err(DiskError::Conflict)));
        let mut back = [0; 512];
        nbd.read(Sector(0), &SegmentsMut::new(&mut back)).await.unwrap();
        assert_eq!(back, data);
        put(&one, &prout(4, 6), &keys(1, 1, 0)).await;
        assert!(matches!(nbd.read(Sector(0), &SegmentsMut::new(&mut back)).await, Err(DiskError::Conflict)));
        put(&one, &prout(3, 0), &keys(1, 0, 0)).await;
        nbd.read(Sector(0), &SegmentsMut::new(&mut back)).await.unwrap();
    });
}

#[test]
fn registrations_are_bounded() {
    lane::block_on(async {
        let bench = Bench::new();
        let one = bench.nexus(1);
        let ids: Vec<u8> = (0..crate::pr::REGISTRANTS_MAX)
            .flat_map(|n| TransportId::iscsi(&format!("iqn.2026-01.many:{n}"), None).unwrap().to_bytes())
            .collect();
        let list = [keys(0, 1, 8), (ids.len() as u32).to_be_bytes().to_vec(), ids].concat();
        let l = (list.len() as u32).to_be_bytes();
        let cdb = [0x5f, 0, 0, 0, 0, l[0], l[1], l[2], l[3], 0];
        refused(&one, &cdb, &list, Sense::illegal(asc::INSUFFICIENT_REGISTRATION_RESOURCES)).await;
        assert!(registered(&one).await.is_empty(), "all or none");
    });
}

/// The same rules, told as a table of who has which key, without a look at the code under test.
#[derive(Default)]
struct Model {
    keys: [u64; 3],
    held: Option<(u8, usize)>,
    generation: u32,
}

impl Model {
    fn all(code: u8) -> bool {
        code == 7 || code == 8
    }

    fn holds(&self, who: usize) -> bool {
        match self.held {
            None => false,
            Some((code, _)) if Self::all(code) => self.keys[who] != 0,
            Some((_, holder)) => holder == who,
        }
    }

    fn may(&self, who: usize, writes: bool) -> bool {
        let Some((code, _)) = self.held else { return true };
        self.holds(who) || code >= 5 && self.keys[who] != 0 || ([1, 5, 7].contains(&code) && !writes)
    }

    /// An all registrants reservation ends with its last registrant, any other with its holder.
    fn settle(&mut self) {
        if let Some((code, holder)) = self.held {
            let dead = if Self::all(code) { self.keys == [0; 3] } else { self.keys[holder] == 0 };
            if dead {
                self.held = None;
            }
        }
    }

    /// The status of an order: 'g' good, 'c' conflict, 'k' check condition.
    fn order(&mut self, who: usize, action: u8, code: u8, key: u64, second: u64) -> char {
        let known = [1, 3, 5, 6, 7, 8].contains(&code);
        let own = self.keys[who];
        match action {
            0 | 6 => {
                if action == 0 && key != own {
                    return 'c';
                }
                if own == 0 && second == 0 {
                    return 'g';
                }
                self.keys[who] = second;
                self.generation += 1;
            }
            1 if !known => return 'k',
            _ if own == 0 || key != own => return 'c',
            1 => match self.held {
                None => self.held = Some((code, who)),
                Some((is, _)) if is == code && self.holds(who) => {}
                Some(_) => return 'c',
            },
            2 => match self.held {
                Some((is, _)) if self.holds(who) && is != code => return 'k',
                Some(_) if self.holds(who) => self.held = None,
                _ => {}
            },
            3 => {
                *self = Self { generation: self.generation + 1, ..Self::default() };
            }
            _ => {
                let over = match self.held {
                    None => false,
                    Some((is, _)) if Self::all(is) => second == 0,
                    Some((_, holder)) => self.keys[holder] == second,
                };
                if second == 0 && !over {
                    return 'k';
                }
                if !over && !self.keys.contains(&second) {
                    return 'c';
                }
                if over && !known {
                    return 'k';
                }
                for other in 0..3 {
                    if over && other == who {
                        continue;
                    }
                    if second == 0 || self.keys[other] == second {
                        self.keys[other] = 0;
                    }
                }
                if over {
                    self.held = Some((code, who));
                }
                self.generation += 1;
            }
        }
        self.settle();
        'g'
    }
}

type Step = (usize, u8, u8, u64, u64);

async fn against_the_model(steps: &[Step]) {
    let bench = Bench::new();
    let nexuses = [bench.nexus(1), bench.nexus(2), bench.nexus(3)];
    let mut model = Model::default();
    for &(who, action, code, key, second) in steps {
        for nexus in &nexuses {
            while attention(nexus).await.is_some() {}
        }
        let (reply, _) = run(&nexuses[who], &prout(action, code), &keys(key, second, 0), 0).await;
        let expected = match model.order(who, action, code, key, second) {
            'g' => Status::Good,
            'c' => Status::ReservationConflict,
            _ => Status::CheckCondition,
        };
        assert_eq!(reply.status, expected, "{:?}", (who, action, code, key, second));
        let state = bench.unit.reservations();
        assert_eq!(state.generation, model.generation);
        for (index, nexus) in nexuses.iter().enumerate() {
            while attention(nexus).await.is_some() {}
            let own = state.registrants().iter().find(|r| r.nexus.initiator == *nexus.initiator());
            assert_eq!(own.map_or(0, |r| r.key), model.keys[index]);
            for (cdb, data, writes) in
                [(cdb10(0x28, 0, 0, 1), &[][..], false), (cdb10(0x2a, 0, 0, 1), &[0; 512], true)]
            {
                let (reply, _) = run(nexus, &cdb, data, 512).await;
                assert_eq!(
                    reply.status == Status::Good,
                    model.may(index, writes),
                    "{index} {writes} {:?}",
                    model.held
                );
            }
        }
        assert_eq!(held(&nexuses[0]).await.map(|h| h.1), model.held.map(|h| h.0));
    }
}

fn cases() -> u32 {
    if std::env::var_os("KAGAMI_SOAK").is_some() { 20_000 } else { 400 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn r54_any_orders_end_as_the_model_says(
        steps in proptest::collection::vec(
            (0usize..3, 0u8..7, prop_oneof![Just(1u8), Just(3), Just(5), Just(6), Just(7), Just(8), 0u8..16], 0u64..4, 0u64..4),
            1..40,
        )
    ) {
        lane::block_on(against_the_model(&steps));
    }
}
