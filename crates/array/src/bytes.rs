//! Little-endian fields of variable length, as the journal and the catalog hold them.

use block::Generation;
use uuid::Uuid;

/// The bytes end too early, or hold a value that no version of us wrote.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Short;

/// Appends fields.
#[derive(Default)]
pub struct Writer {
    /// What was appended.
    pub bytes: Vec<u8>,
}

impl Writer {
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes.push(value);
        self
    }
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }
    pub fn uuid(&mut self, value: Uuid) -> &mut Self {
        self.bytes.extend_from_slice(value.as_bytes());
        self
    }
    pub fn generation(&mut self, value: Generation) -> &mut Self {
        self.u64(value.counter);
        self.bytes.extend_from_slice(&value.id.to_le_bytes());
        self
    }
    /// At most 65,535 bytes are kept.
    pub fn text(&mut self, value: &str) -> &mut Self {
        let mut end = value.len().min(usize::from(u16::MAX));
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes.extend_from_slice(&(end as u16).to_le_bytes());
        self.bytes.extend_from_slice(&value.as_bytes()[..end]);
        self
    }
    pub fn option<T>(&mut self, value: Option<T>, put: impl FnOnce(&mut Self, T) -> &mut Self) -> &mut Self {
        match value {
            None => self.u8(0),
            Some(value) => {
                self.u8(1);
                put(self, value)
            }
        }
    }
}

/// Takes fields off the front.
pub struct Reader<'a> {
    /// What is left.
    pub rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Short> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(Short)?;
        self.rest = rest;
        Ok(*head)
    }
    pub fn u8(&mut self) -> Result<u8, Short> {
        self.take::<1>().map(|b| b[0])
    }
    pub fn u32(&mut self) -> Result<u32, Short> {
        self.take().map(u32::from_le_bytes)
    }
    pub fn u64(&mut self) -> Result<u64, Short> {
        self.take().map(u64::from_le_bytes)
    }
    pub fn uuid(&mut self) -> Result<Uuid, Short> {
        self.take().map(Uuid::from_bytes)
    }
    pub fn generation(&mut self) -> Result<Generation, Short> {
        Ok(Generation { counter: self.u64()?, id: self.take().map(u128::from_le_bytes)? })
    }
    pub fn text(&mut self) -> Result<String, Short> {
        let length = usize::from(u16::from_le_bytes(self.take()?));
        let (head, rest) = self.rest.split_at_checked(length).ok_or(Short)?;
        self.rest = rest;
        String::from_utf8(head.to_vec()).map_err(|_| Short)
    }
    pub fn option<T>(&mut self, get: impl FnOnce(&mut Self) -> Result<T, Short>) -> Result<Option<T>, Short> {
        match self.u8()? {
            0 => Ok(None),
            1 => get(self).map(Some),
            _ => Err(Short),
        }
    }
}
