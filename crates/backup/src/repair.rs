//! After damage was found: keeps what is good, and makes the repository know what it has lost.
//!
//! Content-addressing has a trap: a chunk that rotted is still "there", so no later backup would store it again. Here
//! it is forgotten, so that the next backup that reads it puts it back, for the older backups that need it too.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::pack::{PACKS, check_frames, pack_name, pack_number, read_tables};
use crate::progress::Progress;
use crate::repository::Repository;
use crate::session::Session;

/// What a repair did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Repaired {
    /// Packs with damage; each was set aside under this name, relative to the repository, for whoever wants to look.
    pub set_aside: Vec<PathBuf>,
    /// Chunks of these packs that were good and were moved.
    pub moved_chunks: u64,
    /// Chunks that are lost until a backup stores them again; of a pack whose tables are gone, nothing is known.
    pub lost_chunks: u64,
}

impl Repository {
    /// Reads every pack; moves what is good out of damaged ones and sets these aside. Then a backup that reads
    /// everything ([`crate::Trust::Never`]) heals what is still the same on the disk. Blocks.
    pub fn repair(&self, progress: &Progress) -> Result<Repaired, Error> {
        let session = self.begin("kagami backup repair")?;
        let mut done = Repaired::default();
        let mut bad = HashSet::new();
        for number in self.inner.store.list(Path::new(PACKS))?.iter().filter_map(|n| pack_number(n)) {
            progress.check()?;
            let tables = read_tables(&self.inner.store, self.inner.id, number);
            let looked = tables.and_then(|t| check_frames(&self.inner.store, number, &t));
            match looked {
                Ok(()) => {}
                Err(e) if e.is_damage() => {
                    tracing::warn!(pack = format!("{number:016x}"), error = %e, "damaged pack");
                    self.save_good(&session, number, &mut done)?;
                    bad.insert(number);
                }
                Err(e) => return Err(e),
            }
        }
        if bad.is_empty() {
            return Ok(done);
        }
        session.finish()?;
        let index = &self.inner.index;
        index.replace(&index.segments(), &bad)?;
        for number in bad {
            let (from, to) = (pack_name(number), pack_name(number).with_extension("damaged"));
            self.inner.store.rename(&from, &to)?;
            done.set_aside.push(to);
        }
        self.inner.store.sync_directory(Path::new(PACKS))?;
        Ok(done)
    }

    /// Moves the chunks of a pack whose content still has its name.
    fn save_good(&self, session: &Session, number: u64, done: &mut Repaired) -> Result<(), Error> {
        // Without tables nothing tells frames apart.
        let Ok(tables) = read_tables(&self.inner.store, self.inner.id, number) else { return Ok(()) };
        for (id, at) in tables.locations(number) {
            match self.inner.reader.read(&id, &at) {
                Ok(content) => {
                    session.store_again(id, &content)?;
                    done.moved_chunks += 1;
                }
                Err(e) if e.is_damage() => done.lost_chunks += 1,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}
