//! Reservation commands: PERSISTENT RESERVE IN and OUT (SPC-4), RESERVE and RELEASE (SPC-2).

use std::rc::Rc;

use crate::lun::Call;
use crate::nexus::Seat;
use crate::opcode::Cdb;
use crate::pr::{self, Access, ItNexus, Kept, Order, Refusal};
use crate::reply::{Answer, Fail, Status};
use crate::sense::Sense;
use crate::task::Aborted;
use crate::unit::LogicalUnit;

const CONFLICT: Fail = Fail::Plain(Status::ReservationConflict);

impl LogicalUnit {
    /// PERSISTENT RESERVE IN.
    pub(crate) fn persistent_reserve_in(&self, cdb: &Cdb) -> Result<Answer, Fail> {
        let state = self.pr.borrow();
        Ok(Answer::Data(match cdb.byte(1) & 0x1f {
            0 => pr::keys(&state),
            1 => pr::reservation(&state),
            2 => pr::capabilities(&state),
            3 => pr::full_status(&state),
            _ => return Err(Sense::cdb(1, Some(4)).into()),
        }))
    }

    /// PERSISTENT RESERVE OUT: decided, made durable, put in place (R52); then those concerned are told, and for PREEMPT
    /// AND ABORT their commands have ended before GOOD is answered.
    pub(crate) async fn persistent_reserve_out(&self, call: &Call<'_>, cdb: &Cdb) -> Result<Answer, Fail> {
        let list = call.from.to_vec();
        let order = Order::parse(cdb.byte(1) & 0x1f, cdb.byte(2), cdb.be32(5), &list)?;
        let turn = self.keeping.take().await;
        if call.task.is_aborted() {
            return Ok(Answer::Good); // nobody is answered
        }
        let ports: Vec<u16> = self.ports.borrow().iter().map(|p| p.relative).collect();
        let before = self.pr.borrow().clone();
        let effect = before.apply(&call.seat.it, &order, &ports).map_err(|refusal| match refusal {
            Refusal::Conflict => CONFLICT,
            Refusal::Check(sense) => sense.into(),
        })?;
        if effect.state != before {
            let kept = Kept { state: effect.state.clone(), modes: self.saved.get().into() };
            self.save(&kept).await?;
            *self.pr.borrow_mut() = effect.state;
            self.reservations_changed();
        }
        drop(turn);
        for (nexus, code) in &effect.attentions {
            self.attend(*code, |seat| self.is_of(seat, nexus));
        }
        if !effect.abort.is_empty() {
            let victims = |seat: &Rc<Seat>| {
                !Rc::ptr_eq(seat, call.seat) && effect.abort.iter().any(|nexus| self.is_of(seat, nexus))
            };
            let how = if self.modes.get().task_aborted { Aborted::WithStatus } else { Aborted::Silently };
            let hit = self.tasks.abort(|seat, _| victims(seat).then_some(how));
            self.tasks.have_ended(&hit, Some(call.task.task())).await;
        }
        Ok(Answer::Good)
    }

    /// The seat is one of this I_T nexus.
    fn is_of(&self, seat: &Seat, nexus: &ItNexus) -> bool {
        seat.it == *nexus
            || self.settings.by_name
                && seat.it.port == nexus.port
                && seat.it.initiator.same_name(&nexus.initiator)
    }

    /// Where registrations exist, RESERVE and RELEASE of those whom they concern do nothing and those of others are in
    /// conflict (SPC-4 5.12.3, reported as CRH). True: nothing is to be done.
    fn compatible(&self, seat: &Seat) -> Result<bool, Fail> {
        let state = self.pr.borrow();
        if state.registrants().is_empty() {
            return Ok(false);
        }
        let registrants = state.held().is_some_and(|h| h.kind.for_registrants());
        if state.holds(&seat.it) || (registrants && state.is_registered(&seat.it)) {
            return Ok(true);
        }
        Err(CONFLICT)
    }

    /// RESERVE: the whole logical unit, for this nexus (SPC-2 7.21). That another one holds it was seen already.
    pub(crate) fn reserve(&self, seat: &Rc<Seat>) -> Result<Answer, Fail> {
        if self.pr.borrow().access(&seat.it) != Access::All {
            return Err(CONFLICT);
        }
        if !self.compatible(seat)? {
            *self.reserved.borrow_mut() = Some(Rc::downgrade(seat));
            self.reservations_changed();
        }
        Ok(Answer::Good)
    }

    /// RELEASE (SPC-2 7.17): of one who holds nothing it does nothing.
    pub(crate) fn release(&self, seat: &Rc<Seat>) -> Result<Answer, Fail> {
        if self.reserved_by().is_some_and(|holder| Rc::ptr_eq(&holder, seat)) {
            *self.reserved.borrow_mut() = None;
            self.reservations_changed();
            return Ok(Answer::Good);
        }
        self.compatible(seat).map(|_| Answer::Good)
    }
}
