//! PERSISTENT RESERVE IN: parameter data (SPC-4 clause 6.15).

use super::State;
use crate::bytes::{put16, put32};

fn with_header(state: &State, body: Vec<u8>) -> Vec<u8> {
    let mut out = vec![0; 8];
    put32(&mut out, 0, state.generation);
    put32(&mut out, 4, body.len() as u32);
    out.extend(body);
    out
}

/// READ KEYS (6.15.2).
pub fn keys(state: &State) -> Vec<u8> {
    with_header(state, state.registrants.iter().flat_map(|r| r.key.to_be_bytes()).collect())
}

/// READ RESERVATION (6.15.3). The key of an all registrants reservation is zero.
pub fn reservation(state: &State) -> Vec<u8> {
    let Some(held) = &state.held else { return with_header(state, Vec::new()) };
    let key = held.holder.as_ref().and_then(|h| state.find(h)).map_or(0, |r| r.key);
    let mut body = vec![0; 16];
    body[..8].copy_from_slice(&key.to_be_bytes());
    body[13] = held.kind as u8;
    with_header(state, body)
}

/// REPORT CAPABILITIES (6.15.4).
pub fn capabilities(state: &State) -> Vec<u8> {
    // CRH, SIP_C, ATP_C, PTPL_C; TMV; PTPL_A; all six types.
    const CAN: u8 = 0x10 | 0x08 | 0x04 | 0x01;
    vec![0, 8, CAN, 0x80 | u8::from(state.aptpl), 0xea, 0x01, 0, 0]
}

/// READ FULL STATUS (6.15.5).
pub fn full_status(state: &State) -> Vec<u8> {
    let mut body = Vec::new();
    for registrant in &state.registrants {
        let holds = state.holds(&registrant.nexus);
        let id = registrant.nexus.initiator.to_bytes();
        let mut one = vec![0; 24];
        one[..8].copy_from_slice(&registrant.key.to_be_bytes());
        one[12] = u8::from(registrant.all_ports) << 1 | u8::from(holds);
        if holds {
            one[13] = state.held.as_ref().map_or(0, |h| h.kind as u8);
        }
        put16(&mut one, 18, registrant.nexus.port);
        put32(&mut one, 20, id.len() as u32);
        body.extend(one);
        body.extend(id);
    }
    with_header(state, body)
}
