//! Text in, checked descriptor out. Hostile input: every length is bounded, nothing is trusted twice.

use super::{
    Access, Cid, CreateType, Descriptor, DescriptorError, ExtentKind, ExtentLine, Line, MAX_BYTES,
    MAX_SECTORS, NO_PARENT, What,
};

impl Descriptor {
    /// Parses a descriptor. `bytes` may be followed by NULs (an embedded descriptor's padding).
    pub fn parse(bytes: &[u8]) -> Result<Self, DescriptorError> {
        if bytes.len() > MAX_BYTES {
            return Err(DescriptorError::TooLarge { bytes: bytes.len() as u64 });
        }
        let text_end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        let (text, tail) = bytes.split_at(text_end);
        let mut reader = Reader::default();
        for (index, line) in text.split_inclusive(|b| *b == b'\n').enumerate() {
            reader.line(index + 1, line)?;
        }
        reader.finish(tail)
    }
}

#[derive(Default)]
struct Reader {
    lines: Vec<Line>,
    extents: Vec<ExtentLine>,
    sectors: u64,
    version: bool,
    cid: Option<Cid>,
    parent_cid: Option<Cid>,
    create_type: Option<CreateType>,
    parent_hint: Option<Vec<u8>>,
}

impl Reader {
    fn line(&mut self, number: usize, raw: &[u8]) -> Result<(), DescriptorError> {
        let content = raw.trim_ascii();
        let what = if content.is_empty() || content[0] == b'#' {
            What::Nothing
        } else if !self.version {
            self.version(number, raw)?
        } else {
            let word = content.split(u8::is_ascii_whitespace).next().unwrap_or_default();
            match Access::from_word(word) {
                Some(access) => self.extent(number, access, content)?,
                None => self.pair(number, raw)?,
            }
        };
        self.lines.push(Line { bytes: raw.to_vec(), what });
        Ok(())
    }

    fn version(&mut self, line: usize, raw: &[u8]) -> Result<What, DescriptorError> {
        let what = split_pair(raw).ok_or(DescriptorError::NotADescriptor { line })?;
        let What::Pair { key, value } = &what else { return Err(DescriptorError::NotADescriptor { line }) };
        let known = matches!(&raw[value.clone()], b"1" | b"2" | b"3");
        if !raw[key.clone()].eq_ignore_ascii_case(b"version") || !known {
            return Err(DescriptorError::NotADescriptor { line });
        }
        self.version = true;
        Ok(what)
    }

    fn pair(&mut self, line: usize, raw: &[u8]) -> Result<What, DescriptorError> {
        let corrupt = |what| DescriptorError::Corrupt { line, what, found: shorten(raw) };
        let what = split_pair(raw).ok_or_else(|| corrupt("should be an extent or key = value"))?;
        let What::Pair { key, value } = &what else { return Ok(what) };
        let (key, value) = (&raw[key.clone()], &raw[value.clone()]);
        if key.eq_ignore_ascii_case(b"CID") {
            once(
                line,
                "CID",
                &mut self.cid,
                parse_cid(value).ok_or_else(|| corrupt("a CID is 8 hex digits"))?,
            )?;
        } else if key.eq_ignore_ascii_case(b"parentCID") {
            let cid = parse_cid(value).ok_or_else(|| corrupt("a parentCID is 8 hex digits"))?;
            once(line, "parentCID", &mut self.parent_cid, cid)?;
        } else if key.eq_ignore_ascii_case(b"createType") {
            let text = std::str::from_utf8(value).map_err(|_| corrupt("a create type is ASCII"))?;
            once(line, "createType", &mut self.create_type, CreateType::from_text(text))?;
        } else if key.eq_ignore_ascii_case(b"parentFileNameHint") {
            once(line, "parentFileNameHint", &mut self.parent_hint, value.to_vec())?;
        }
        Ok(what)
    }

    fn extent(&mut self, line: usize, access: Access, content: &[u8]) -> Result<What, DescriptorError> {
        let corrupt = |what| DescriptorError::Corrupt { line, what, found: shorten(content) };
        let text = std::str::from_utf8(content).map_err(|_| corrupt("extent file names are UTF-8"))?;
        // RW 1048576000 VMFSRDM "maildb-d-rdm.vmdk" [offset]
        let (before, name, after) = match text.split_once('"') {
            Some((before, rest)) => {
                let (name, after) =
                    rest.rsplit_once('"').ok_or_else(|| corrupt("the file name has no end"))?;
                (before, name, after)
            }
            None => (text, "", ""),
        };
        let mut words = before.split_ascii_whitespace().skip(1);
        let sectors: u64 = words
            .next()
            .and_then(|w| w.parse().ok())
            .ok_or_else(|| corrupt("the extent's length should be a number of sectors"))?;
        let kind = words.next().ok_or_else(|| corrupt("the extent's type is missing"))?;
        let kind = ExtentKind::from_text(kind);
        let mut after = after.split_ascii_whitespace();
        let offset = match after.next() {
            Some(word) => word.parse().map_err(|_| corrupt("the extent's offset should be a number"))?,
            None => 0u64,
        };
        // Some writers put a partition's or a device's id behind: QEMU and we read past it.
        if words.next().is_some() || name.contains('"') {
            return Err(corrupt("an extent is: access, length, type, \"file\", offset"));
        }
        if name.is_empty() && kind != ExtentKind::Zero {
            return Err(corrupt("the extent names no file"));
        }
        self.sectors = self.sectors.saturating_add(sectors);
        if self.sectors > MAX_SECTORS || offset > MAX_SECTORS {
            return Err(corrupt("the disk would be larger than 64 TiB"));
        }
        self.extents.push(ExtentLine { access, sectors, kind, file: name.to_owned(), offset });
        Ok(What::Extent(self.extents.len() - 1))
    }

    fn finish(self, tail: &[u8]) -> Result<Descriptor, DescriptorError> {
        let missing = |what| DescriptorError::Missing { what };
        if !self.version {
            return Err(DescriptorError::NotADescriptor { line: 0 });
        }
        if self.extents.is_empty() {
            return Err(missing("extent"));
        }
        Ok(Descriptor {
            lines: self.lines,
            extents: self.extents,
            tail: tail.to_vec(),
            cid: self.cid.ok_or(missing("CID"))?,
            parent_cid: self.parent_cid.unwrap_or(NO_PARENT),
            create_type: self.create_type.ok_or(missing("createType"))?,
        })
    }
}

/// Takes a value that decides something: a second, different one would make readers disagree about this disk.
fn once<T: PartialEq>(
    line: usize,
    what: &'static str,
    place: &mut Option<T>,
    value: T,
) -> Result<(), DescriptorError> {
    match place {
        Some(old) if *old != value => Err(DescriptorError::Twice { line, what: what.to_owned() }),
        Some(_) => Ok(()),
        None => {
            *place = Some(value);
            Ok(())
        }
    }
}

/// Where key and value stand in a line, without spaces and quotes; `None` when there is no `=` or no key.
fn split_pair(raw: &[u8]) -> Option<What> {
    let equals = raw.iter().position(|b| *b == b'=')?;
    let key = trimmed(raw, 0, equals);
    let mut value = trimmed(raw, equals + 1, raw.len());
    if value.len() >= 2 && raw[value.start] == b'"' && raw[value.end - 1] == b'"' {
        value = value.start + 1..value.end - 1;
    }
    (!key.is_empty()).then_some(What::Pair { key, value })
}

fn trimmed(raw: &[u8], start: usize, end: usize) -> std::ops::Range<usize> {
    let part = &raw[start..end];
    let start = start + (part.len() - part.trim_ascii_start().len());
    start..start + part.trim_ascii().len()
}

fn parse_cid(value: &[u8]) -> Option<Cid> {
    if value.is_empty() || value.len() > 8 || !value.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u32::from_str_radix(std::str::from_utf8(value).ok()?, 16).ok().map(Cid)
}

fn shorten(raw: &[u8]) -> String {
    String::from_utf8_lossy(&raw.trim_ascii()[..raw.trim_ascii().len().min(80)]).into_owned()
}

/// The line's end: LF, CR LF, or nothing.
pub(super) fn line_end(bytes: &[u8]) -> &[u8] {
    let start = match bytes {
        [.., b'\r', b'\n'] => bytes.len() - 2,
        [.., b'\n'] => bytes.len() - 1,
        _ => bytes.len(),
    };
    &bytes[start..]
}

pub(super) fn extent_text(extent: &ExtentLine) -> String {
    let mut text = format!("{} {} {}", extent.access.word(), extent.sectors, extent.kind);
    if extent.kind != ExtentKind::Zero {
        text += &format!(" \"{}\"", extent.file);
    }
    if extent.kind == ExtentKind::Flat {
        text += &format!(" {}", extent.offset);
    }
    text
}
