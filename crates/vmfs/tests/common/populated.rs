//! A volume of ours that holds one of everything.

use std::rc::Rc;

use block::MemoryDisk;
use vmfs::format::RdmRecord;
use vmfs::{Layout, NewFile, Rdm};

use super::datastore::{GIB, MIB, fresh, open, write};

/// Three GiB with files of every kind, some of them moved, replaced and removed.
pub fn populated() -> Rc<MemoryDisk> {
    super::at_once(async {
        let disk = fresh(3 * GIB).await;
        let volume = open(disk.clone()).await;
        for directory in ["/vm", "/vm/deep", "/empty", "/many"] {
            volume.make_directory(directory).await.unwrap();
        }
        volume.write_file("/small", b"hello").await.unwrap();
        volume.write_file("/vm/vm.vmx", &vec![b'x'; 3000]).await.unwrap();
        volume.write_file("/vm/vmware.log", &vec![b'y'; 5 << 20]).await.unwrap();
        volume.make_symlink("/link", "/vm/vm.vmx").await.unwrap();
        let record = RdmRecord::naa([0x60; 16], b"kagami");
        let rdm = Rdm { record, length: 8 * GIB, tail: b"tail".to_vec() };
        volume.create_rdm("/vm/data-rdm.vmdk", &rdm).await.unwrap();
        for (name, length) in [("/vm/thin-flat.vmdk", 100 * GIB), ("/vm/large-flat.vmdk", 300 * GIB)] {
            let file = volume
                .create_file(name, NewFile { length, layout: Layout::Thin, grows_to: 0 })
                .await
                .unwrap();
            for at in [0, 3 * MIB, 42 * GIB] {
                write(&volume, &file, at / 512, &[7; 4096]).await;
            }
        }
        let thick = NewFile { length: 20 * MIB, layout: Layout::LazyZeroed, grows_to: 0 };
        let file = volume.create_file("/vm/thick-flat.vmdk", thick).await.unwrap();
        write(&volume, &file, 2048, &[9; 512]).await;
        for n in 0..80 {
            volume.write_file(&format!("/many/file{n}"), format!("{n}").as_bytes()).await.unwrap();
        }
        for n in (0..80).step_by(3) {
            volume.remove(&format!("/many/file{n}")).await.unwrap();
        }
        volume.rename("/many/file1", "/many/file2").await.unwrap();
        volume.rename("/small", "/vm/deep/small").await.unwrap();
        volume.settle().await.unwrap();
        disk
    })
}
