//! Data of handshake options: foreign bytes in, checked values out. Every length is checked against what is there.

use super::NAME_BYTES_MAX;

/// Why the data of an option is refused.
#[derive(Copy, Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Malformed {
    /// Shorter than its own lengths say.
    #[error("the option's data ends too early")]
    Truncated,
    /// Longer than its own lengths say.
    #[error("the option has data left over")]
    LeftOver,
    /// A name or query is longer than 4096 bytes.
    #[error("a string is longer than 4096 bytes")]
    StringTooLong,
    /// A name or query is not UTF-8.
    #[error("a string is not UTF-8")]
    NotUtf8,
}

/// Cuts an option's data into pieces.
struct Cutter<'a>(&'a [u8]);

impl<'a> Cutter<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self.0.split_at_checked(count).ok_or(Malformed::Truncated)?;
        self.0 = tail;
        Ok(head)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        let (head, tail) = self.0.split_first_chunk().ok_or(Malformed::Truncated)?;
        self.0 = tail;
        Ok(u32::from_be_bytes(*head))
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        let (head, tail) = self.0.split_first_chunk().ok_or(Malformed::Truncated)?;
        self.0 = tail;
        Ok(u16::from_be_bytes(*head))
    }

    fn string(&mut self) -> Result<&'a str, Malformed> {
        let length = self.u32()? as usize;
        if length > NAME_BYTES_MAX {
            return Err(Malformed::StringTooLong);
        }
        std::str::from_utf8(self.bytes(length)?).map_err(|_| Malformed::NotUtf8)
    }

    fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed::LeftOver) }
    }
}

/// Data of EXPORT_NAME: nothing but the name.
pub fn export_name(data: &[u8]) -> Result<&str, Malformed> {
    if data.len() > NAME_BYTES_MAX {
        return Err(Malformed::StringTooLong);
    }
    std::str::from_utf8(data).map_err(|_| Malformed::NotUtf8)
}

/// Data of INFO and GO: the export's name and what the client wants to know besides.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InfoRequest<'a> {
    /// Name of the export.
    pub name: &'a str,
    /// Wants [`super::info::NAME`].
    pub wants_name: bool,
    /// Wants [`super::info::DESCRIPTION`].
    pub wants_description: bool,
    /// Wants [`super::info::BLOCK_SIZE`], and so promises to heed it.
    pub wants_block_size: bool,
}

/// Parses the data of INFO and GO. Unknown kinds of information are passed over, as the document demands.
pub fn info_request(data: &[u8]) -> Result<InfoRequest<'_>, Malformed> {
    let mut cutter = Cutter(data);
    let name = cutter.string()?;
    let mut request =
        InfoRequest { name, wants_name: false, wants_description: false, wants_block_size: false };
    for _ in 0..cutter.u16()? {
        match cutter.u16()? {
            super::info::NAME => request.wants_name = true,
            super::info::DESCRIPTION => request.wants_description = true,
            super::info::BLOCK_SIZE => request.wants_block_size = true,
            _ => {}
        }
    }
    cutter.end()?;
    Ok(request)
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT: the export's name and queries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ContextRequest<'a> {
    /// Name of the export.
    pub name: &'a str,
    /// Queries, in order.
    pub queries: Vec<&'a str>,
}

/// Parses the data of LIST_META_CONTEXT and SET_META_CONTEXT. The data is bounded by `OPTION_BYTES_MAX`, so the
/// number of queries is bounded by a quarter of it.
pub fn context_request(data: &[u8]) -> Result<ContextRequest<'_>, Malformed> {
    let mut cutter = Cutter(data);
    let name = cutter.string()?;
    let count = cutter.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(cutter.string()?);
    }
    cutter.end()?;
    Ok(ContextRequest { name, queries })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_data_is_checked() {
        let good = [&[0, 0, 0, 2][..], b"c:", &[0, 2, 0, 3, 0, 9]].concat();
        let request = info_request(&good).unwrap();
        assert!(request.name == "c:" && request.wants_block_size && !request.wants_name);
        for cut in 0..good.len() {
            assert_eq!(info_request(&good[..cut]), Err(Malformed::Truncated));
        }
        assert_eq!(info_request(&[&good[..], b"x"].concat()), Err(Malformed::LeftOver));
        assert_eq!(info_request(&[255; 20]), Err(Malformed::StringTooLong));
        assert_eq!(info_request(&[0, 0, 0, 1, 0xff, 0, 0]), Err(Malformed::NotUtf8));
    }

    #[test]
    fn context_data_is_checked() {
        let good = [&[0, 0, 0, 1][..], b"d", &[0, 0, 0, 1, 0, 0, 0, 5], b"base:"].concat();
        assert_eq!(context_request(&good).unwrap().queries, ["base:"]);
        for cut in 0..good.len() {
            assert_eq!(context_request(&good[..cut]), Err(Malformed::Truncated));
        }
        let many = [&[0, 0, 0, 0][..], &[255; 4]].concat();
        assert_eq!(context_request(&many), Err(Malformed::Truncated));
    }
}
