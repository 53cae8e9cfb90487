//! Serves one file or block device as vhost-user-blk, for measuring: `vhost_file FILE SOCKET`.
//!
//! Prints what carries the I/O, then serves one front end after the other until it is killed. QEMU takes it with
//! `-object memory-backend-memfd,id=m,size=1G,share=on -numa node,memdev=m -chardev socket,id=d,path=SOCKET
//! -device vhost-user-blk-pci,chardev=d`.

use std::error::Error;

use front::vhost::{Export, NewExport};
use lane::net::Listener;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(file), Some(socket)) = (arguments.next(), arguments.next()) else {
        return Err("usage: vhost_file FILE SOCKET".into());
    };
    lane::block_on(async {
        let disk = media::open(&file, media::Options::default()).await?;
        println!("{}", disk.in_use());
        let listener = Listener::unix(&socket, 0o600)?;
        let new = NewExport { name: file, disk, read_only: false, serial: "kagami-file".into() };
        let _export = Export::start(listener, new);
        std::future::pending::<()>().await;
        Ok(())
    })
}
