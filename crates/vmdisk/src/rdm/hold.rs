//! A mapped LUN that disappears under a running VM (semantics page 2.2, its table): I/O is held for a bounded time,
//! then answered with [`DiskError::Gone`] (NOT READY to the guest) while the VM stays up; it goes on when the LUN is
//! back with the identity and generation it had.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Disk, DiskError, Extents, Generation, Io, Safe, Sector, Segments, SegmentsMut, Shape};

use super::identity::Identity;
use super::resolve::{Luns, Resolution, ResolveError, may_resume, open, resolve};
use crate::part::Part;

/// How long I/O is held: well below the 60 s after which Windows' virtio drivers reset the disk.
pub const HOLD: Duration = Duration::from_secs(30);
/// The LUNs are looked through so often while one is away.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Opens the LUN of a mapping as [`open`] does; when it disappears, I/O waits for it, `hold` long. `luns` is asked
/// where it is meanwhile.
pub fn open_held(
    identity: &Identity,
    luns: Rc<dyn Luns>,
    read_only: bool,
    hold: Duration,
) -> Result<Rc<dyn Disk>, ResolveError> {
    let visible = luns.visible();
    let part = open(identity, &visible, read_only)?;
    let (Resolution::Resolved(lun) | Resolution::Larger(lun)) = resolve(identity, &visible) else {
        // Opened for rescue: nothing that would come back as it was recorded.
        return Ok(part);
    };
    Ok(Rc::new(HeldLun {
        identity: identity.clone(),
        hold,
        read_only,
        generation: lun.identity.ours.and_then(|ours| ours.generation),
        shape: part.shape(),
        lun: RefCell::new(Rc::clone(&lun.disk)),
        part: RefCell::new(part),
        luns,
        gone: Cell::new(false),
        away_since: Cell::new(None),
        looked: Cell::new(None),
        changed: Cell::new(false),
        unflushed: Cell::new(false),
        doubtful: Cell::new(false),
    }))
}

/// A mapped LUN that may go and come back.
struct HeldLun {
    identity: Identity,
    luns: Rc<dyn Luns>,
    hold: Duration,
    read_only: bool,
    /// What it was when it was opened: another one on return means that somebody rolled it back.
    generation: Option<Generation>,
    shape: Shape,
    /// The LUN itself, and the part of it that is mapped.
    lun: RefCell<Rc<dyn Disk>>,
    part: RefCell<Rc<dyn Disk>>,
    /// An operation saw it gone, and it was not found again since.
    gone: Cell<bool>,
    /// Since when no operation has reached it.
    away_since: Cell<Option<Instant>>,
    looked: Cell<Option<Instant>>,
    /// It came back with another content: nothing goes on until the disk is opened again.
    changed: Cell<bool>,
    /// Writes were acknowledged that no flush has reached.
    unflushed: Cell<bool>,
    /// And then the LUN was opened anew: whether they are there nobody knows. The next flush says so, once.
    doubtful: Cell<bool>,
}

impl HeldLun {
    async fn through(
        &self,
        operation: impl AsyncFn(&dyn Disk) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        loop {
            let part = self.present().await?;
            match operation(&*part).await {
                Err(DiskError::Gone) => self.lost(),
                answer => {
                    if let Some(since) = self.away_since.take() {
                        let seconds = lane::now().saturating_duration_since(since).as_secs_f32();
                        tracing::info!(lun = self.identity.lun.display(), seconds, "a mapped LUN is back");
                    }
                    return answer;
                }
            }
        }
    }

    fn lost(&self) {
        self.gone.set(true);
        if self.away_since.get().is_none() {
            tracing::error!(lun = self.identity.lun.display(), "a mapped LUN is gone; its I/O is held");
            self.away_since.set(Some(lane::now()));
        }
    }

    /// The disk, as soon as it is there and no later than the hold allows.
    async fn present(&self) -> Result<Rc<dyn Disk>, DiskError> {
        loop {
            if self.changed.get() {
                let said = ResolveError::Generation { identity: self.identity.lun.display() };
                return Err(DiskError::Io(Arc::new(std::io::Error::other(said.to_string()))));
            }
            if !self.gone.get() || self.look() {
                return Ok(Rc::clone(&self.part.borrow()));
            }
            let now = lane::now();
            let waited = self.away_since.get().map_or(Duration::ZERO, |since| now - since);
            if waited >= self.hold {
                return Err(DiskError::Gone);
            }
            lane::sleep(LOOK_EVERY.min(self.hold - waited)).await;
        }
    }

    /// Looks whether it is back, not too often: many may be waiting.
    fn look(&self) -> bool {
        let now = lane::now();
        if self.looked.get().is_some_and(|last| now.saturating_duration_since(last) < LOOK_EVERY) {
            return false;
        }
        self.looked.set(Some(now));
        let visible = self.luns.visible();
        let lun = match may_resume(&self.identity, self.generation, &visible) {
            Ok(lun) => lun,
            Err(error) => {
                if matches!(error, ResolveError::Generation { .. }) {
                    tracing::error!(%error, "a mapped LUN is not used any further");
                    self.changed.set(true);
                }
                return false;
            }
        };
        let sectors = self.identity.lun.sectors;
        let Ok(part) = Part::new(Rc::clone(&lun.disk), Sector(0), sectors, self.read_only) else {
            return false;
        };
        if !Rc::ptr_eq(&*self.lun.borrow(), &lun.disk) && self.unflushed.take() {
            self.doubtful.set(true);
        }
        *self.lun.borrow_mut() = Rc::clone(&lun.disk);
        *self.part.borrow_mut() = part;
        self.gone.set(false);
        true
    }

    async fn change(
        &self,
        safe: Safe,
        operation: impl AsyncFn(&dyn Disk) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        self.through(operation).await?;
        if safe == Safe::AtNextFlush {
            self.unflushed.set(true);
        }
        Ok(())
    }

    async fn flush_now(&self) -> Result<(), DiskError> {
        // What is acknowledged while the flush runs waits for the next one.
        let before = self.unflushed.take();
        let answer = self.through(async |disk| disk.flush().await).await;
        if answer.is_err() && before {
            self.unflushed.set(true);
        }
        answer?;
        if self.doubtful.take() {
            let what =
                "writes were acknowledged before the LUN went away, and it was opened anew before a flush";
            return Err(DiskError::Io(Arc::new(std::io::Error::other(what))));
        }
        Ok(())
    }
}

impl Disk for HeldLun {
    fn shape(&self) -> Shape {
        self.shape
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        Box::pin(self.through(async move |disk| disk.read(at, into).await))
    }

    fn write<'a>(&'a self, at: Sector, from: &'a Segments<'a>, safe: Safe) -> Io<'a> {
        Box::pin(self.change(safe, async move |disk| disk.write(at, from, safe).await))
    }

    fn zero(&self, at: Sector, count: u64, may_free: bool) -> Io<'_> {
        Box::pin(self.change(Safe::AtNextFlush, async move |disk| disk.zero(at, count, may_free).await))
    }

    fn unmap(&self, at: Sector, count: u64) -> Io<'_> {
        Box::pin(self.change(Safe::AtNextFlush, async move |disk| disk.unmap(at, count).await))
    }

    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        // Asked once: `out` may hold a part of the answer when it fails.
        Box::pin(async move {
            let part = self.present().await?;
            part.status(at, count, since, out).await.inspect_err(|error| {
                if matches!(error, DiskError::Gone) {
                    self.lost();
                }
            })
        })
    }

    fn compare_and_write<'a>(
        &'a self,
        at: Sector,
        expected: &'a Segments<'a>,
        new: &'a Segments<'a>,
    ) -> Io<'a> {
        // Once it was sent nobody knows whether it was done; asked again it would miscompare with its own work.
        Box::pin(async move {
            let part = self.present().await?;
            let answer = part.compare_and_write(at, expected, new).await;
            match &answer {
                Err(DiskError::Gone) => self.lost(),
                Ok(()) => self.unflushed.set(true),
                Err(_) => {}
            }
            answer
        })
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(self.flush_now())
    }
}

#[cfg(test)]
mod tests {
    use block::MemoryDisk;
    use block::decorate::{Decorated, Operation, Passing};
    use uuid::Uuid;

    use super::super::identity::{LunIdentity, Mode, Ours};
    use super::super::resolve::VisibleLun;
    use super::*;

    const SECTORS: u64 = 64;

    /// A LUN whose cable can be pulled.
    #[derive(Default)]
    struct Cable {
        pulled: Cell<bool>,
        tried: Cell<u32>,
    }

    impl Passing for Cable {
        fn before(&self, _operation: Operation, _at: Sector, _count: u64) -> Io<'_> {
            self.tried.set(self.tried.get() + 1);
            Box::pin(std::future::ready(if self.pulled.get() { Err(DiskError::Gone) } else { Ok(()) }))
        }
    }

    #[derive(Default)]
    struct Bus(RefCell<Vec<VisibleLun>>);

    impl Luns for Bus {
        fn visible(&self) -> Vec<VisibleLun> {
            self.0.borrow().clone()
        }
    }

    fn identity(generation: u64) -> LunIdentity {
        let ours = Ours {
            array: Uuid::from_u128(1),
            lun: Uuid::from_u128(2),
            generation: Some(Generation { counter: generation, id: 1 }),
        };
        LunIdentity {
            sectors: SECTORS,
            logical_block: 512,
            physical_block: 512,
            ours: Some(ours),
            ..LunIdentity::default()
        }
    }

    struct Scene {
        bus: Rc<Bus>,
        lun: Rc<Decorated<Cable>>,
        disk: Rc<dyn Disk>,
    }

    impl Scene {
        fn new() -> Self {
            let lun = Decorated::new(Rc::new(MemoryDisk::new(SECTORS)), Cable::default());
            let bus = Rc::new(Bus::default());
            let scene = |disk| Self { bus: Rc::clone(&bus), lun: Rc::clone(&lun), disk };
            bus.0.borrow_mut().push(seen(Rc::clone(&lun) as Rc<dyn Disk>, 1));
            let identity = Identity { mode: Mode::Physical, lun: identity(1) };
            scene(open_held(&identity, Rc::clone(&bus) as Rc<dyn Luns>, false, HOLD).unwrap())
        }

        fn pull(&self) {
            self.lun.passing.pulled.set(true);
            self.bus.0.borrow_mut().clear();
        }

        fn plug(&self, disk: Rc<dyn Disk>, generation: u64) {
            self.lun.passing.pulled.set(false);
            self.bus.0.borrow_mut().push(seen(disk, generation));
        }

        async fn write(&self, byte: u8) -> Result<(), DiskError> {
            self.disk.write(Sector(3), &Segments::new(&[byte; 512]), Safe::AtNextFlush).await
        }
    }

    fn simulated(test: impl Future<Output = ()>) {
        let driver = lane::DriverKind::Sim { seed: 1 };
        lane::block_on_with(lane::Options { driver, ..Default::default() }, test);
    }

    fn seen(disk: Rc<dyn Disk>, generation: u64) -> VisibleLun {
        VisibleLun { unit: 1, name: "lun".into(), identity: identity(generation), disk }
    }

    #[test]
    fn it_is_a_disk() {
        simulated(async {
            let sized = |sectors| LunIdentity { sectors, ..identity(1) };
            for (mapped, read_only) in [(4096, false), (3000, false), (4096, true)] {
                let bus = Rc::new(Bus::default());
                let disk: Rc<dyn Disk> = Rc::new(MemoryDisk::new(4096));
                bus.0.borrow_mut().push(VisibleLun { identity: sized(4096), ..seen(disk, 1) });
                let identity = Identity { mode: Mode::Physical, lun: sized(mapped) };
                let held = open_held(&identity, bus as Rc<dyn Luns>, read_only, HOLD).unwrap();
                match read_only {
                    true => block::conformance::check_read_only(held).await,
                    false => block::conformance::check(held, mapped).await,
                }
            }
        });
    }

    #[test]
    fn a_lun_that_comes_back_in_time_is_not_missed() {
        simulated(async {
            let scene = Rc::new(Scene::new());
            scene.write(1).await.unwrap();
            scene.pull();
            let waiting = lane::spawn({
                let scene = Rc::clone(&scene);
                async move {
                    let begun = lane::now();
                    scene.write(2).await.unwrap();
                    lane::now() - begun
                }
            });
            lane::sleep(Duration::from_secs(20)).await;
            assert!(scene.lun.passing.tried.get() < 4, "who waits does not hammer");
            scene.plug(Rc::clone(&scene.lun) as Rc<dyn Disk>, 1);
            let waited = waiting.await;
            assert!(waited >= Duration::from_secs(20) && waited < Duration::from_secs(21), "{waited:?}");
            scene.disk.flush().await.unwrap();
            let mut bytes = [0; 512];
            scene.disk.read(Sector(3), &SegmentsMut::new(&mut bytes)).await.unwrap();
            assert_eq!(bytes, [2; 512]);
        });
    }

    #[test]
    fn after_the_hold_the_guest_is_told_and_goes_on_when_it_returns() {
        simulated(async {
            let scene = Scene::new();
            scene.pull();
            let begun = lane::now();
            assert!(matches!(scene.write(1).await, Err(DiskError::Gone)));
            let waited = lane::now() - begun;
            assert!(waited >= HOLD && waited < HOLD + Duration::from_secs(1), "{waited:?}");
            let begun = lane::now();
            assert!(matches!(scene.write(1).await, Err(DiskError::Gone)), "no second hold");
            assert!(lane::now() - begun < Duration::from_secs(1));
            scene.plug(Rc::clone(&scene.lun) as Rc<dyn Disk>, 1);
            lane::sleep(LOOK_EVERY).await;
            scene.write(2).await.unwrap();
            scene.pull();
            let begun = lane::now();
            assert!(matches!(scene.write(1).await, Err(DiskError::Gone)));
            assert!(lane::now() - begun >= HOLD, "a new hold");
        });
    }

    #[test]
    fn a_lun_that_was_rolled_back_meanwhile_is_not_used() {
        simulated(async {
            let scene = Scene::new();
            scene.pull();
            scene.plug(Rc::clone(&scene.lun) as Rc<dyn Disk>, 7);
            scene.lun.passing.pulled.set(true);
            let said = scene.write(1).await.err().unwrap();
            assert!(said.to_string().contains("another generation"), "{said}");
            scene.bus.0.borrow_mut().clear();
            scene.plug(Rc::clone(&scene.lun) as Rc<dyn Disk>, 1);
            assert!(scene.write(1).await.is_err(), "the operator decides, by opening the disk again");
        });
    }

    #[test]
    fn writes_that_a_lun_opened_anew_may_have_lost_fail_the_next_flush() {
        simulated(async {
            let scene = Scene::new();
            scene.write(1).await.unwrap();
            scene.pull();
            scene.plug(Rc::new(MemoryDisk::new(SECTORS)), 1);
            scene.lun.passing.pulled.set(true);
            scene.write(2).await.unwrap();
            assert!(scene.disk.flush().await.is_err());
            scene.write(3).await.unwrap();
            scene.disk.flush().await.unwrap();
        });
    }
}
