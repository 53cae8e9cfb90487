//! What a target does with initiators that no real program plays: wrong digests and numbers, several R2Ts at once,
//! sessions that replace each other, silence.
#![allow(clippy::unwrap_used)] // a test may

#[path = "common/initiator.rs"]
mod initiator;
#[path = "common/target.rs"]
mod target;

use std::rc::Rc;
use std::time::Duration;

use block::MemoryDisk;
use front::iscsi::format::{
    AsyncMessage, LoginResponse, LogoutRequest, NO_TAG, Nop, ReadyToTransfer, Reject, TextRequest,
};
use front::iscsi::{
    Ending, LoginStatus, Options, Outcome, Reason, Server, event, flag, function, opcode, stage,
};
use initiator::{Initiator, UNSOLICITED, read10, write10};
use lane::DriverKind;
use target::{name, open_to_all};

const DISK: &str = "iqn.2024-01.kagami:disk";

struct World {
    disk: Rc<MemoryDisk>,
    server: Rc<Server>,
}

impl World {
    async fn logged_in(&self, isid: u8, keys: &str) -> Initiator {
        let mut initiator = Initiator::connect(&self.server, isid);
        assert_eq!(initiator.log_in(DISK, keys).await.0, 0);
        initiator.settle().await;
        initiator
    }

    fn bytes(&self, from: usize, length: usize) -> Vec<u8> {
        self.disk.to_bytes()[from..from + length].to_vec()
    }
}

/// Runs on a simulated lane, for its clock.
fn with<F: Future<Output = ()>>(options: Options, test: impl Fn(World) -> F) {
    for seed in 0..3 {
        let driver = DriverKind::Sim { seed };
        lane::block_on_with(lane::Options { driver, ..Default::default() }, async {
            let disk = Rc::new(MemoryDisk::new(8192));
            let server = open_to_all(DISK, Rc::clone(&disk), None, options.clone());
            let world = World { disk, server: Rc::clone(&server) };
            test(world).await;
            server.close().await;
            for target in server.targets().all() {
                assert_eq!(target.counts().in_flight(), 0, "every command has ended");
            }
        });
    }
}

#[test]
fn a_wrong_data_digest_ends_the_command_only() {
    with(Options::default(), |world| async move {
        let mut initiator = world.logged_in(1, "HeaderDigest=CRC32C\0DataDigest=CRC32C\0").await;
        // Immediate data.
        let head = initiator.command(1, flag::FINAL | flag::WRITE, 512, &write10(0, 1));
        initiator.spoil = (false, true);
        initiator.send(&head, &[9; 512]).await;
        let reject: Reject = initiator.expect(opcode::REJECT).await.view();
        assert_eq!(reject.reason, Reason::DataDigest as u8);
        assert_eq!(initiator.expect(opcode::SCSI_RESPONSE).await.sense(), (0xb, 0x4705));
        // Solicited data: the answer waits for the last of them.
        let head = initiator.command(2, flag::FINAL | flag::WRITE, 2048, &write10(0, 4));
        initiator.send(&head, &[]).await;
        let r2t: ReadyToTransfer = initiator.expect(opcode::R2T).await.view();
        let tag = r2t.transfer_tag.get();
        initiator.spoil = (false, true);
        initiator.send(&Initiator::data_out(2, tag, 0, 0, false), &[9; 1024]).await;
        initiator.expect(opcode::REJECT).await;
        initiator.send(&Initiator::data_out(2, tag, 1, 1024, true), &[9; 1024]).await;
        assert_eq!(initiator.expect(opcode::SCSI_RESPONSE).await.sense(), (0xb, 0x4705));
        assert_eq!(world.bytes(0, 2048), [0; 2048], "nothing was written");
        // The session goes on.
        let head = initiator.command(3, flag::FINAL | flag::WRITE, 512, &write10(0, 1));
        initiator.send(&head, &[7; 512]).await;
        assert_eq!(initiator.expect(opcode::SCSI_RESPONSE).await.head[3], 0);
        let head = initiator.command(4, flag::FINAL | flag::READ, 1024, &read10(0, 2));
        initiator.send(&head, &[]).await;
        let data = initiator.expect(opcode::DATA_IN).await.data;
        assert_eq!(data, [[7; 512], [0; 512]].concat());
        // A header that cannot be trusted ends it.
        initiator.spoil = (true, false);
        let head = initiator.command(5, flag::FINAL, 0, &[0; 6]);
        initiator.send(&head, &[]).await;
        assert!(initiator.receive().await.is_none());
        assert!(matches!(initiator.serving.await, Ending::Digest(_)));
    });
}

#[test]
fn several_r2ts_are_open_at_once() {
    with(Options::default(), |world| async move {
        let keys = "MaxOutstandingR2T=3\0MaxBurstLength=1024\0ImmediateData=No\0InitialR2T=Yes\0";
        let mut initiator = world.logged_in(1, keys).await;
        let head = initiator.command(1, flag::FINAL | flag::WRITE, 5 * 1024, &write10(8, 10));
        initiator.send(&head, &[]).await;
        let mut open = Vec::new();
        for number in 0..3 {
            let r2t: ReadyToTransfer = initiator.expect(opcode::R2T).await.view();
            let place = (r2t.r2t_sn.get(), r2t.offset.get(), r2t.length.get());
            assert_eq!(place, (number, number * 1024, 1024));
            open.push(r2t.transfer_tag.get());
        }
        for number in 0..5u32 {
            let tag = open[number as usize];
            let fill = [number as u8 + 1; 512];
            initiator.send(&Initiator::data_out(1, tag, 0, number * 1024, false), &fill).await;
            initiator.send(&Initiator::data_out(1, tag, 1, number * 1024 + 512, true), &fill).await;
            if number < 2 {
                let r2t: ReadyToTransfer = initiator.expect(opcode::R2T).await.view();
                assert_eq!(r2t.r2t_sn.get(), number + 3);
                open.push(r2t.transfer_tag.get());
            }
        }
        let answer = initiator.expect(opcode::SCSI_RESPONSE).await;
        assert_eq!((answer.head[3], answer.number(36)), (0, 5), "status, and ExpDataSN counts the R2Ts");
        for number in 0..5 {
            assert_eq!(world.bytes(4096 + number * 1024, 1024), [number as u8 + 1; 1024]);
        }
    });
}

#[test]
fn data_that_were_not_agreed_on_fail_the_command() {
    with(Options::default(), |world| async move {
        let mut initiator = world.logged_in(1, "ImmediateData=No\0InitialR2T=Yes\0").await;
        let head = initiator.command(1, flag::FINAL | flag::WRITE, 512, &write10(0, 1));
        initiator.send(&head, &[9; 512]).await;
        assert_eq!(initiator.expect(opcode::SCSI_RESPONSE).await.sense(), (0xb, 0x0c0c));
        // More than the R2T asked for.
        let head = initiator.command(2, flag::FINAL | flag::WRITE, 512, &write10(0, 1));
        initiator.send(&head, &[]).await;
        let r2t: ReadyToTransfer = initiator.expect(opcode::R2T).await.view();
        initiator.send(&Initiator::data_out(2, r2t.transfer_tag.get(), 0, 0, true), &[9; 1024]).await;
        assert_eq!(initiator.expect(opcode::SCSI_RESPONSE).await.sense(), (0xb, 0x0c0d));
        // For a task that does not exist: nothing happens.
        initiator.send(&Initiator::data_out(77, UNSOLICITED, 0, 0, true), &[9; 512]).await;
        initiator.settle().await;
        assert_eq!(world.bytes(0, 1024), [0; 1024]);
    });
}

#[test]
fn unsolicited_data_come_without_being_asked_for() {
    with(Options::default(), |world| async move {
        let mut initiator = world.logged_in(1, "InitialR2T=No\0FirstBurstLength=2048\0").await;
        let head = initiator.command(1, flag::WRITE, 4096, &write10(0, 8));
        initiator.send(&head, &[1; 512]).await;
        initiator.send(&Initiator::data_out(1, UNSOLICITED, 0, 512, false), &[2; 512]).await;
        initiator.send(&Initiator::data_out(1, UNSOLICITED, 1, 1024, true), &[3; 1024]).await;
        let r2t: ReadyToTransfer = initiator.expect(opcode::R2T).await.view();
        assert_eq!((r2t.offset.get(), r2t.length.get()), (2048, 2048));
        initiator.send(&Initiator::data_out(1, r2t.transfer_tag.get(), 0, 2048, true), &[4; 2048]).await;
        assert_eq!(initiator.expect(opcode::SCSI_RESPONSE).await.head[3], 0);
        assert_eq!(world.bytes(0, 4096), [vec![1; 512], vec![2; 512], vec![3; 1024], vec![4; 2048]].concat());
    });
}

#[test]
fn a_write_that_waits_for_data_can_be_aborted() {
    with(Options::default(), |world| async move {
        let mut initiator = world.logged_in(1, "").await;
        let head = initiator.command(1, flag::FINAL | flag::WRITE, 512, &write10(0, 1));
        initiator.send(&head, &[]).await;
        let r2t: ReadyToTransfer = initiator.expect(opcode::R2T).await.view();
        initiator.send(&initiator.function(2, function::ABORT_TASK, 1), &[]).await;
        let answer = initiator.expect(opcode::TASK_MANAGEMENT_RESPONSE).await;
        assert_eq!(answer.head[2], Outcome::Complete as u8);
        initiator.send(&Initiator::data_out(1, r2t.transfer_tag.get(), 0, 0, true), &[9; 512]).await;
        initiator.settle().await; // the task is not answered, and the session goes on
        assert_eq!(world.bytes(0, 512), [0; 512]);
        initiator.send(&initiator.function(3, function::TASK_REASSIGN, 1), &[]).await;
        let answer = initiator.expect(opcode::TASK_MANAGEMENT_RESPONSE).await;
        assert_eq!(answer.head[2], Outcome::ReassignNotSupported as u8);
        initiator.send(&initiator.function(4, function::QUERY_TASK, 1), &[]).await;
        let answer = initiator.expect(opcode::TASK_MANAGEMENT_RESPONSE).await;
        assert_eq!(answer.head[2], Outcome::NotSupported as u8, "RFC 7144 was not agreed on");
    });
}

#[test]
fn immediate_commands_are_bounded_and_can_still_be_aborted() {
    with(Options::default(), |world| async move {
        let mut initiator = world.logged_in(1, "InitialR2T=No\0").await;
        // Each waits for data that the initiator has not sent yet.
        let write = |initiator: &mut Initiator, tag: u32| {
            let mut head = initiator.command(tag, flag::WRITE, 1024, &write10(tag, 2));
            initiator.cmd_sn -= 1;
            head.opcode |= opcode::IMMEDIATE;
            head
        };
        for tag in 0..32 {
            let head = write(&mut initiator, tag);
            initiator.send(&head, &[tag as u8; 512]).await;
        }
        for tag in 32..40 {
            let head = write(&mut initiator, tag);
            initiator.send(&head, &[0xee; 512]).await;
            let reject: Reject = initiator.expect(opcode::REJECT).await.view();
            assert_eq!(reject.reason, Reason::TooManyImmediate as u8);
            // Its data are passed over.
            initiator.send(&Initiator::data_out(tag, UNSOLICITED, 0, 512, true), &[0xee; 512]).await;
        }
        // There is always room for the function that ends one of them.
        initiator.send(&initiator.function(100, function::ABORT_TASK, 31), &[]).await;
        let answer = initiator.expect(opcode::TASK_MANAGEMENT_RESPONSE).await;
        assert_eq!(answer.head[2], Outcome::Complete as u8);
        initiator.settle().await; // and for what has its number
        let head = write(&mut initiator, 50);
        initiator.send(&head, &[50; 512]).await;
        for tag in (0..31).chain([50]) {
            initiator.send(&Initiator::data_out(tag, UNSOLICITED, 0, 512, true), &[tag as u8; 512]).await;
            assert_eq!(initiator.expect(opcode::SCSI_RESPONSE).await.head[3], 0, "{tag}");
            assert_eq!(world.bytes(tag as usize * 512 + 512, 512), [tag as u8; 512]);
        }
        assert_eq!(world.bytes(52 * 512, 512), [0; 512]);
    });
}

#[test]
fn numbers_outside_of_the_window_are_ignored_and_a_gap_ends_the_session() {
    with(Options::default(), |world| async move {
        let mut initiator = world.logged_in(1, "").await;
        let now = initiator.cmd_sn;
        for wrong in [now - 1, now + 1000] {
            initiator.cmd_sn = wrong;
            let head = initiator.command(5, flag::FINAL, 0, &[0; 6]);
            initiator.send(&head, &[]).await;
        }
        initiator.cmd_sn = now;
        let head = initiator.command(6, flag::FINAL, 0, &[0; 6]);
        initiator.send(&head, &[]).await;
        assert_eq!(initiator.expect(opcode::SCSI_RESPONSE).await.number(16), 6);
        initiator.cmd_sn += 1;
        let head = initiator.command(7, flag::FINAL, 0, &[0; 6]);
        initiator.send(&head, &[]).await;
        assert_eq!(initiator.expect(opcode::REJECT).await.head[2], Reason::Protocol as u8);
        assert!(initiator.receive().await.is_none());
        assert!(matches!(initiator.serving.await, Ending::Fault(_)));
    });
}

#[test]
fn a_new_session_takes_the_place_of_the_old_one() {
    with(Options::default(), |world| async move {
        let mut old = world.logged_in(1, "").await;
        let other = world.logged_in(2, "").await;
        let head = old.command(1, flag::FINAL | flag::WRITE, 512, &write10(0, 1));
        old.send(&head, &[]).await;
        old.expect(opcode::R2T).await;
        let mut new = world.logged_in(1, "").await;
        assert!(old.receive().await.is_none());
        assert!(matches!(old.serving.await, Ending::Reinstated));
        new.settle().await;
        assert_eq!(world.server.sessions().len(), 2);
        // A session that is not there cannot be continued, and there is one connection each.
        for (tsih, cid, status) in [
            (77, 0, LoginStatus::SessionDoesNotExist),
            (world.server.sessions()[0].tsih, 5, LoginStatus::TooManyConnections),
        ] {
            let mut late = Initiator::connect(&world.server, if cid == 5 { 1 } else { 3 });
            let tsih = if cid == 5 { of_isid(&world.server, 1) } else { tsih };
            let mut request =
                late.login_request(flag::TRANSIT | stage::OPERATIONAL << 2 | stage::FULL_FEATURE);
            (request.tsih, request.cid) = (tsih.into(), cid.into());
            let text = format!("InitiatorName={}\0TargetName={DISK}\0", initiator::NAME);
            late.send(&request, text.as_bytes()).await;
            let answer: LoginResponse = late.expect(opcode::LOGIN_RESPONSE).await.view();
            assert_eq!(answer.status.get(), status as u16);
        }
        other.hang_up();
        assert!(matches!(other.serving.await, Ending::Closed));
    });
}

fn of_isid(server: &Rc<Server>, isid: u8) -> u16 {
    server.sessions().iter().find(|session| session.isid[5] == isid).unwrap().tsih
}

#[test]
fn pings_both_ways() {
    with(Options::default(), |world| async move {
        let mut initiator = world.logged_in(1, "").await;
        let ping = Nop {
            opcode: opcode::NOP_OUT | opcode::IMMEDIATE,
            flags: flag::FINAL,
            tag: 9.into(),
            transfer_tag: NO_TAG.into(),
            number1: initiator.cmd_sn.into(),
            ..Nop::zeroed()
        };
        initiator.send(&ping, b"hello").await;
        let answer = initiator.expect(opcode::NOP_IN).await;
        assert_eq!((answer.number(16), &answer.data[..]), (9, &b"hello"[..]));
        // Silence: the target asks, and believes an answer.
        let asked: Nop = initiator.expect(opcode::NOP_IN).await.view();
        assert_eq!(asked.tag.get(), NO_TAG);
        let answer = Nop { tag: NO_TAG.into(), transfer_tag: asked.transfer_tag, ..ping };
        initiator.send(&answer, &[]).await;
        // It asks again, and without an answer gives up.
        initiator.expect(opcode::NOP_IN).await;
        assert!(initiator.receive().await.is_none());
        assert!(matches!(initiator.serving.await, Ending::Silent));
    });
}

#[test]
fn data_that_never_come_end_the_session() {
    with(Options { ping_after: Duration::from_secs(3600), ..Options::default() }, |world| async move {
        let mut initiator = world.logged_in(1, "").await;
        let head = initiator.command(1, flag::FINAL | flag::WRITE, 512, &write10(0, 1));
        initiator.send(&head, &[]).await;
        initiator.expect(opcode::R2T).await;
        assert!(initiator.receive().await.is_none());
        assert!(matches!(initiator.serving.await, Ending::Silent));
    });
}

#[test]
fn half_open_logins_are_few_and_short() {
    with(Options { logins_max: 3, ..Options::default() }, |world| async move {
        let idle: Vec<_> = (0..3).map(|isid| Initiator::connect(&world.server, isid)).collect();
        lane::yield_now().await;
        while world.server.sessions().len() < 3 {
            lane::yield_now().await;
        }
        let late = Initiator::connect(&world.server, 9);
        assert!(matches!(late.serving.await, Ending::Crowded));
        for initiator in idle {
            assert!(matches!(initiator.serving.await, Ending::LateLogin));
        }
        world.logged_in(1, "").await;
    });
}

#[test]
fn a_discovery_session_asks_and_does_nothing_else() {
    with(Options::default(), |world| async move {
        let mut initiator = Initiator::connect(&world.server, 1);
        assert_eq!(initiator.log_in("", "MaxBurstLength=4096\0").await.0, 0);
        let request = TextRequest {
            opcode: opcode::TEXT | opcode::IMMEDIATE,
            flags: flag::FINAL,
            tag: 3.into(),
            transfer_tag: NO_TAG.into(),
            cmd_sn: initiator.cmd_sn.into(),
            ..TextRequest::zeroed()
        };
        initiator.send(&request, b"SendTargets=All\0").await;
        let answer = initiator.expect(opcode::TEXT_RESPONSE).await;
        assert_eq!(answer.data, format!("TargetName={DISK}\0").as_bytes(), "no portal listens in this test");
        initiator.send(&request, b"SendTargets=iqn.2024-01.kagami:none\0").await;
        assert_eq!(initiator.expect(opcode::TEXT_RESPONSE).await.data, b"");
        let head = initiator.command(4, flag::FINAL, 0, &[0; 6]);
        initiator.send(&head, &[]).await;
        assert_eq!(initiator.expect(opcode::REJECT).await.head[2], Reason::Protocol as u8);
    });
}

#[test]
fn logins_that_are_wrong_are_refused() {
    let table = [
        ("TargetName=iqn.2024-01.kagami:none\0", LoginStatus::NotFound),
        ("", LoginStatus::MissingParameter),
        ("SessionType=Other\0", LoginStatus::SessionTypeNotSupported),
        ("TargetName=iqn.2024-01.kagami:disk\0InitialR2T=No\0InitialR2T=No\0", LoginStatus::InitiatorError),
        ("TargetName=iqn.2024-01.kagami:disk\0MaxRecvDataSegmentLength=1\0", LoginStatus::InitiatorError),
    ];
    with(Options::default(), |world| async move {
        for (text, status) in table {
            let mut initiator = Initiator::connect(&world.server, 1);
            let request =
                initiator.login_request(flag::TRANSIT | stage::OPERATIONAL << 2 | stage::FULL_FEATURE);
            initiator.send(&request, format!("InitiatorName={}\0{text}", initiator::NAME).as_bytes()).await;
            let answer: LoginResponse = initiator.expect(opcode::LOGIN_RESPONSE).await.view();
            assert_eq!(answer.status.get(), status as u16, "{text:?}");
            assert!(initiator.receive().await.is_none());
        }
        // A text without end.
        let mut initiator = Initiator::connect(&world.server, 1);
        let request = initiator.login_request(flag::CONTINUE | stage::OPERATIONAL << 2);
        let status = loop {
            initiator.send(&request, &[b'x'; 4096]).await;
            let answer: LoginResponse = initiator.expect(opcode::LOGIN_RESPONSE).await.view();
            if answer.status.get() != 0 {
                break answer.status.get();
            }
        };
        assert_eq!(status, LoginStatus::InitiatorError as u16);
    });
}

#[test]
fn logout_ends_what_is_under_way() {
    with(Options::default(), |world| async move {
        let mut initiator = world.logged_in(1, "").await;
        let head = initiator.command(1, flag::FINAL | flag::WRITE, 512, &write10(0, 1));
        initiator.send(&head, &[]).await;
        initiator.expect(opcode::R2T).await;
        let mut logout = LogoutRequest {
            opcode: opcode::LOGOUT | opcode::IMMEDIATE,
            reason: flag::FINAL | 1,
            tag: 2.into(),
            cid: 5.into(),
            cmd_sn: initiator.cmd_sn.into(),
            ..LogoutRequest::zeroed()
        };
        initiator.send(&logout, &[]).await;
        assert_eq!(initiator.expect(opcode::LOGOUT_RESPONSE).await.head[2], 1, "no such connection");
        logout.cid = 0.into();
        initiator.send(&logout, &[]).await;
        assert_eq!(initiator.expect(opcode::LOGOUT_RESPONSE).await.head[2], 0);
        assert!(initiator.receive().await.is_none());
        assert!(matches!(initiator.serving.await, Ending::Logout));
    });
}

#[test]
fn a_target_that_goes_asks_for_logout_first() {
    with(Options::default(), |world| async move {
        let initiator = world.logged_in(1, "").await;
        let removing = {
            let server = Rc::clone(&world.server);
            lane::spawn(async move { server.remove(&name(DISK)).await })
        };
        let message: AsyncMessage = initiator.expect(opcode::ASYNC_MESSAGE).await.view();
        assert_eq!((message.event, message.parameter3.get()), (event::LOGOUT_REQUEST, 3));
        assert!(initiator.receive().await.is_none(), "it did not, and is cut off");
        assert!(matches!(initiator.serving.await, Ending::Removed));
        assert!(removing.await);
        let mut late = Initiator::connect(&world.server, 1);
        assert_eq!(late.log_in(DISK, "").await.0, LoginStatus::NotFound as u16);
    });
}
