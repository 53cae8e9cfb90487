use super::*;
use std::rc::Rc;

fn drivers() -> [DriverKind; 3] {
    [DriverKind::Ring, DriverKind::Threads, DriverKind::Sim { seed: 7 }]
}

fn on(driver: DriverKind) -> Options {
    Options { driver, ..Default::default() }
}

#[test]
fn tasks_sleep_and_answer() {
    for driver in drivers() {
        let out = block_on_with(on(driver), async {
            let slow = spawn(async {
                sleep(Duration::from_millis(20)).await;
                2
            });
            let far = crate::offload(|| 40).await;
            slow.await + far
        });
        assert_eq!(out, 42, "{driver:?}");
    }
}

#[test]
fn sleepers_wake_in_the_order_of_their_time() {
    for driver in drivers() {
        block_on_with(on(driver), async {
            let log = Rc::new(RefCell::new(Vec::new()));
            let began = now();
            let tasks: Vec<_> = [30u64, 10, 20, 0]
                .into_iter()
                .map(|ms| {
                    let log = Rc::clone(&log);
                    spawn(async move {
                        sleep(Duration::from_millis(ms)).await;
                        log.borrow_mut().push(ms);
                    })
                })
                .collect();
            // A timer that is dropped wakes nobody.
            drop(spawn(async {
                let mut never = pin!(sleep(Duration::MAX));
                std::future::poll_fn(|cx| {
                    assert!(never.as_mut().poll(cx).is_pending());
                    Poll::Ready(())
                })
                .await;
            }));
            for task in tasks {
                task.await;
            }
            assert_eq!(*log.borrow(), [0, 10, 20, 30], "{driver:?}");
            assert!(now() - began >= Duration::from_millis(30));
        });
    }
}

#[test]
fn virtual_time_does_not_pass_by_itself() {
    let began = Instant::now();
    block_on_with(on(DriverKind::Sim { seed: 1 }), async {
        let start = now();
        sleep(Duration::from_secs(86400)).await;
        assert!(now() - start >= Duration::from_secs(86400));
    });
    assert!(began.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_lane_counts_what_it_does() {
    block_on_with(on(DriverKind::Threads), async {
        let before = counters();
        spawn(yield_now()).await;
        sleep(Duration::from_millis(1)).await;
        let (a, b) = crate::net::Stream::pair().unwrap();
        a.send_all(&crate::Segments::new(b"x")).await.unwrap();
        b.recv_all(&crate::SegmentsMut::new(&mut [0])).await.unwrap();
        let after = counters();
        assert_eq!(after.operations - before.operations, 2);
        assert!(after.turns > before.turns && after.polls > before.polls && after.sleeps > before.sleeps);
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_simulated_deadlock_is_told() {
    block_on_with(on(DriverKind::Sim { seed: 1 }), std::future::pending::<()>());
}

fn order_of(seed: u64) -> Vec<u32> {
    block_on_with(on(DriverKind::Sim { seed }), async {
        let log = Rc::new(RefCell::new(Vec::new()));
        let tasks: Vec<_> = (0..20)
            .map(|n| {
                let log = Rc::clone(&log);
                spawn(async move {
                    yield_now().await;
                    log.borrow_mut().push(n);
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        log.take()
    })
}

#[test]
fn a_seed_is_an_order() {
    assert_eq!(order_of(5), order_of(5));
    assert_ne!(order_of(5), order_of(6));
}

#[test]
fn a_lane_answers_other_threads() {
    for driver in [DriverKind::Ring, DriverKind::Threads] {
        let handle = start(Options { name: "far".into(), ..on(driver) }).unwrap();
        let answer = block_on_with(
            on(driver),
            handle.run(|| async {
                yield_now().await;
                7
            }),
        );
        assert_eq!(answer, 7);
        handle.stop();
        handle.stop();
    }
}

#[test]
fn a_panic_on_the_lane_reaches_the_caller_and_the_lane_goes_on() {
    let handle = start(Options { name: "panics".into(), ..Default::default() }).unwrap();
    let asked = std::panic::catch_unwind(|| {
        block_on(handle.run(|| async {
            yield_now().await;
            panic!("planned")
        }))
    });
    assert!(asked.is_err());
    assert_eq!(block_on(handle.run(|| async { 1 })), 1);
    handle.stop();
    let late = std::panic::catch_unwind(|| block_on(handle.run(|| async { 1 })));
    assert!(late.is_err(), "a stopped lane answers nobody");
}

#[test]
fn tasks_that_are_not_finished_are_dropped_with_the_lane() {
    struct Told(Rc<Cell<u32>>);
    impl Drop for Told {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }
    let dropped = Rc::new(Cell::new(0));
    let told = Told(Rc::clone(&dropped));
    block_on(async move {
        drop(spawn(async move {
            let _told = told;
            std::future::pending::<()>().await
        }));
        yield_now().await;
    });
    assert_eq!(dropped.get(), 1);
}

#[test]
fn a_task_slot_is_used_again_and_old_wakers_are_harmless() {
    block_on(async {
        let waker = spawn(std::future::poll_fn(|cx| Poll::Ready(cx.waker().clone()))).await;
        for _ in 0..100_000 {
            spawn(async {}).await;
        }
        waker.wake_by_ref();
        let count = Rc::new(Cell::new(0));
        let polls = Rc::clone(&count);
        let task = spawn(std::future::poll_fn(move |_| {
            polls.set(polls.get() + 1);
            if polls.get() > 2 { Poll::Ready(()) } else { Poll::Pending }
        }));
        yield_now().await;
        assert_eq!(count.get(), 1, "polled only when woken");
        drop(task);
    });
}

#[test]
fn many_lanes_talk_to_each_other() {
    let lanes: Vec<Handle> =
        (0..4).map(|n| start(Options { name: format!("lane{n}"), ..Default::default() }).unwrap()).collect();
    // A token goes round; each lane asks the next one.
    fn pass(lanes: Rc<Vec<Handle>>, at: usize, left: u32) -> std::pin::Pin<Box<dyn Future<Output = u32>>> {
        Box::pin(async move {
            if left == 0 {
                return 0;
            }
            let (next, all) = ((at + 1) % lanes.len(), (*lanes).clone());
            1 + lanes[next].run(move || pass(Rc::new(all), next, left - 1)).await
        })
    }
    let sum = block_on(async {
        let all = Rc::new(lanes.clone());
        let tasks: Vec<_> = (0..8).map(|n| spawn(pass(Rc::clone(&all), n % 4, 200))).collect();
        let mut sum = 0;
        for task in tasks {
            sum += task.await;
        }
        sum
    });
    assert_eq!(sum, 1600);
    lanes.iter().for_each(Handle::stop);
}

#[test]
fn who_yields_in_a_loop_does_not_stop_the_world() {
    for driver in drivers() {
        block_on_with(on(driver), async {
            let come = Rc::new(Cell::new(false));
            let told = Rc::clone(&come);
            drop(spawn(async move {
                sleep(Duration::from_micros(300)).await;
                crate::offload(|| ()).await;
                told.set(true);
            }));
            while !come.get() {
                yield_now().await;
            }
        });
    }
}

#[test]
fn a_panic_of_a_task_ends_the_lane_and_nothing_aborts() {
    for driver in [DriverKind::Ring, DriverKind::Threads] {
        let ended = std::panic::catch_unwind(|| {
            block_on_with(on(driver), async {
                drop(spawn(async {
                    yield_now().await;
                    panic!("planned");
                }));
                let (a, _b) = crate::net::Stream::pair().unwrap();
                let how =
                    crate::fs::Open { read_only: true, lock: crate::fs::Lock::None, ..Default::default() };
                let file = crate::fs::File::open("/proc/self/exe", &how).await.unwrap();
                let mut much = crate::Buffer::zeroed(1 << 20);
                file.read_at(0, &crate::SegmentsMut::new(&mut much)).await.unwrap();
                a.recv(&crate::SegmentsMut::new(&mut [0])).await.unwrap();
            })
        });
        assert!(ended.is_err());
        assert_eq!(block_on(async { 1 }), 1, "the thread can run another lane");
    }
}
