//! PDUs from the wire: header segments, digests, data segments.

use zerocopy::FromBytes;

use super::ending::{Ending, Fault};
use super::format::{DEFAULT_SEGMENT_BYTES, DIGEST_BYTES, HEADER_BYTES, Header, padding};
use crate::wire::Input;

/// The header segments of a PDU.
pub(super) struct Pdu {
    /// Basic header segment.
    pub head: [u8; HEADER_BYTES],
    /// Additional header segments, as they came.
    pub additional: Vec<u8>,
}

impl Pdu {
    /// The basic header as one of its kind.
    pub fn view<T: FromBytes>(&self) -> T {
        const { assert!(size_of::<T>() == HEADER_BYTES) };
        match T::read_from_bytes(&self.head) {
            Ok(view) => view,
            Err(_) => unreachable!("the length is that of a header"),
        }
    }
}

/// Takes PDUs from a connection.
pub(super) struct Reader {
    input: Input,
    header_digest: bool,
    data_digest: bool,
    segment_bytes_max: usize,
}

impl Reader {
    /// As login begins: no digests, short segments.
    pub fn new(input: Input) -> Self {
        Self { input, header_digest: false, data_digest: false, segment_bytes_max: DEFAULT_SEGMENT_BYTES }
    }

    /// From the next PDU on what was negotiated is in force.
    pub fn agree(&mut self, header_digest: bool, data_digest: bool, segment_bytes_max: usize) {
        (self.header_digest, self.data_digest) = (header_digest, data_digest);
        self.segment_bytes_max = segment_bytes_max;
    }

    /// Where it receives from.
    pub fn input(&mut self) -> &mut Input {
        &mut self.input
    }

    /// The header segments of the next PDU; `None` when the initiator has closed before it. The data segment must be
    /// taken next, by [`Reader::data`] or [`Reader::skip`].
    pub async fn next(&mut self) -> Result<Option<Pdu>, Ending> {
        if !self.input.fill(HEADER_BYTES, "a PDU").await? {
            return Ok(None);
        }
        let mut head = [0; HEADER_BYTES];
        head.copy_from_slice(&self.input.ready()[..HEADER_BYTES]);
        let Ok(header) = Header::ref_from_bytes(&head) else {
            unreachable!("the length is that of a header")
        };
        let segments = HEADER_BYTES + usize::from(header.ahs_words) * 4;
        let digest = if self.header_digest { DIGEST_BYTES } else { 0 };
        let whole = segments + digest;
        if whole > HEADER_BYTES {
            self.input.fill(whole, "a PDU's header").await?;
        }
        let ready = self.input.ready();
        if self.header_digest && crc32c::crc32c(&ready[..segments]).to_le_bytes() != ready[segments..whole] {
            return Err(Ending::Digest("a header"));
        }
        let additional = ready[HEADER_BYTES..segments].to_vec(); // nothing is allocated for none
        let data_bytes = header.data_bytes();
        self.input.used(whole);
        if data_bytes > self.segment_bytes_max {
            return Err(Fault::new("a data segment longer than was agreed", "13.12").into());
        }
        Ok(Some(Pdu { head, additional }))
    }

    /// Takes a data segment of `length` bytes. What does not fit into `into` is passed over. False when its digest
    /// does not match.
    pub async fn data(&mut self, into: &mut [u8], length: usize) -> Result<bool, Ending> {
        let taken = into.len().min(length);
        let into = &mut into[..taken];
        let trailer = padding(length) + if self.data_digest && length > 0 { DIGEST_BYTES } else { 0 };
        if taken > 0 {
            let ahead = if taken == length { trailer + HEADER_BYTES + DIGEST_BYTES } else { 0 };
            self.input.payload(into, ahead).await?;
        }
        if !self.data_digest {
            self.input.skip(length - taken + trailer, "a data segment").await?;
            return Ok(true);
        }
        let mut sum = crc32c::crc32c(into);
        let mut rest = length - taken + padding(length);
        while rest > 0 {
            if !self.input.fill(1, "a data segment").await? {
                return Err(Ending::Hangup("a data segment"));
            }
            let there = self.input.ready().len().min(rest);
            sum = crc32c::crc32c_append(sum, &self.input.ready()[..there]);
            self.input.used(there);
            rest -= there;
        }
        if length == 0 {
            return Ok(true);
        }
        if !self.input.fill(DIGEST_BYTES, "a data digest").await? {
            return Err(Ending::Hangup("a data digest"));
        }
        let well = sum.to_le_bytes() == self.input.ready()[..DIGEST_BYTES];
        self.input.used(DIGEST_BYTES);
        Ok(well)
    }

    /// Passes over a data segment.
    pub async fn skip(&mut self, length: usize) -> Result<(), Ending> {
        self.data(&mut [], length).await.map(|_| ())
    }
}
