//! Text requests in full-feature phase (RFC 7143 sections 11.10 and 11.11): SendTargets, and texts in several PDUs
//! either way.

use super::codes::{Reason, flag, opcode};
use super::ending::Fault;
use super::format::{NO_TAG, TextRequest, TextResponse};
use super::negotiate::{Answer, Limits, Negotiation, Phase};
use super::text;

/// Most text of one exchange that an initiator may send, in bytes.
const TEXT_BYTES_MAX: usize = 16 << 10;

/// The one exchange that a connection may have under way.
#[derive(Default)]
pub(super) struct TextExchange {
    /// With which tag the initiator goes on.
    transfer_tag: Option<u32>,
    /// What came so far of a text that goes on.
    incoming: Vec<u8>,
    /// What is still to be sent.
    outgoing: Vec<u8>,
}

/// What to send.
pub(super) struct Piece {
    pub head: TextResponse,
    pub data: Vec<u8>,
    /// The initiator takes segments of this length from now on.
    pub segment_bytes_max: Option<usize>,
}

impl TextExchange {
    /// Takes one request. `targets` answers SendTargets; `transfer_tag` is one that nobody uses; `room` is the longest
    /// segment that the initiator takes.
    pub fn take(
        &mut self,
        head: &TextRequest,
        data: &[u8],
        room: usize,
        transfer_tag: u32,
        targets: impl Fn(&str) -> Option<Vec<u8>>,
    ) -> Result<Piece, Reason> {
        let tag = head.transfer_tag.get();
        if tag == NO_TAG {
            *self = Self::default(); // a new one; what was before is forgotten (11.10.4)
        } else if self.transfer_tag != Some(tag) {
            return Err(Reason::Protocol);
        }
        if self.incoming.len() + data.len() > TEXT_BYTES_MAX {
            *self = Self::default();
            return Err(Reason::LongOperation);
        }
        let mut segment_bytes_max = None;
        let goes_on = head.flags & flag::CONTINUE != 0;
        let sends_rest = !self.outgoing.is_empty() && data.is_empty();
        self.incoming.extend(data);
        if !goes_on && !sends_rest {
            let whole = std::mem::take(&mut self.incoming);
            let answer = answer(&whole, targets, &mut segment_bytes_max);
            self.outgoing = answer.map_err(|_| Reason::Protocol)?;
        }
        let rest = self.outgoing.split_off(self.outgoing.len().min(room));
        let data = std::mem::replace(&mut self.outgoing, rest);
        let more = !self.outgoing.is_empty();
        let is_last = !more && !goes_on && head.flags & flag::FINAL != 0;
        self.transfer_tag = (!is_last).then_some(transfer_tag);
        let flags = if is_last { flag::FINAL } else { 0 } | if more { flag::CONTINUE } else { 0 };
        let head = TextResponse {
            opcode: opcode::TEXT_RESPONSE,
            flags,
            lun: head.lun,
            tag: head.tag,
            transfer_tag: self.transfer_tag.unwrap_or(NO_TAG).into(),
            ..TextResponse::zeroed()
        };
        Ok(Piece { head, data, segment_bytes_max })
    }
}

fn answer(
    whole: &[u8],
    targets: impl Fn(&str) -> Option<Vec<u8>>,
    segment_bytes_max: &mut Option<usize>,
) -> Result<Vec<u8>, Fault> {
    let mut out = Vec::new();
    for (key, value) in text::parse(whole)? {
        if key == "SendTargets" {
            match targets(value) {
                Some(list) => out.extend(list),
                None => text::push(&mut out, key, "Reject"),
            }
            continue;
        }
        let mut talk = Negotiation::default();
        match talk.offer(&Limits::default(), Phase::FullFeature, key, value)? {
            Answer::Value(value) => text::push(&mut out, key, &value),
            Answer::Silent if key == "MaxRecvDataSegmentLength" => {
                *segment_bytes_max = Some(talk.parameters.segment_bytes_max);
            }
            Answer::Silent => {}
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(flags: u8, transfer_tag: u32) -> TextRequest {
        TextRequest { flags, transfer_tag: transfer_tag.into(), ..TextRequest::zeroed() }
    }

    fn list(value: &str) -> Option<Vec<u8>> {
        (value == "All").then(|| vec![b'x'; 1000])
    }

    #[test]
    fn a_long_answer_comes_in_pieces() {
        let mut exchange = TextExchange::default();
        let first =
            exchange.take(&request(flag::FINAL, NO_TAG), b"SendTargets=All\0", 600, 1, list).ok().unwrap();
        assert_eq!((first.data.len(), first.head.flags), (600, flag::CONTINUE));
        assert_eq!(first.head.transfer_tag.get(), 1);
        let rest = exchange.take(&request(flag::FINAL, 1), b"", 600, 2, list).ok().unwrap();
        assert_eq!((rest.data.len(), rest.head.flags), (400, flag::FINAL));
        assert_eq!(rest.head.transfer_tag.get(), NO_TAG);
        assert!(exchange.take(&request(flag::FINAL, 2), b"", 600, 3, list).is_err(), "it is over");
    }

    #[test]
    fn a_long_question_comes_in_pieces() {
        let mut exchange = TextExchange::default();
        let first = exchange.take(&request(flag::CONTINUE, NO_TAG), b"SendTar", 600, 1, list).ok().unwrap();
        assert_eq!((first.data.len(), first.head.flags), (0, 0));
        let rest = exchange.take(&request(flag::FINAL, 1), b"gets=none\0X-a=b\0", 600, 2, list).ok().unwrap();
        assert_eq!(rest.data, b"SendTargets=Reject\0X-a=NotUnderstood\0");
        let endless = vec![b'a'; 9000];
        exchange.take(&request(flag::CONTINUE, NO_TAG), &endless, 600, 3, list).ok().unwrap();
        let refused = exchange.take(&request(flag::CONTINUE, 3), &endless, 600, 4, list);
        assert_eq!(refused.err(), Some(Reason::LongOperation));
    }

    #[test]
    fn the_segment_length_may_change() {
        let mut exchange = TextExchange::default();
        let text = b"MaxRecvDataSegmentLength=4096\0MaxBurstLength=512\0";
        let piece = exchange.take(&request(flag::FINAL, NO_TAG), text, 600, 1, list).ok().unwrap();
        assert_eq!(piece.segment_bytes_max, Some(4096));
        assert_eq!(piece.data, b"MaxBurstLength=Reject\0");
    }
}
