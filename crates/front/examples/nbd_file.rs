//! Serves one file or block device by NBD, for measuring: `nbd_file FILE unix:PATH|ADDRESS:PORT`.
//!
//! The export's name is empty. Prints what carries the I/O, then serves until it is killed.

use std::error::Error;

use front::nbd::{Exports, NewExport, Options, Server, Tls};
use lane::net::Listener;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(file), Some(endpoint)) = (arguments.next(), arguments.next()) else {
        return Err("usage: nbd_file FILE unix:PATH|ADDRESS:PORT".into());
    };
    lane::block_on(async {
        let disk = media::open(&file, media::Options::default()).await?;
        println!("{}", disk.in_use());
        let exports = Exports::new();
        exports.add(NewExport::new("", disk))?;
        let server = Server::new(exports, Options::default());
        let listener = match endpoint.strip_prefix("unix:") {
            Some(path) => Listener::unix(path, 0o600)?,
            None => Listener::tcp(endpoint.parse()?)?,
        };
        server.listen(listener, Tls::Off);
        std::future::pending::<()>().await;
        Ok(())
    })
}
