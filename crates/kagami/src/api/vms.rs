//! Datastores, disks, mappings, VMs, exports.

use axum::Json;
use axum::extract::{Path, State};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::{Body, Change, Dry, Query, Shared};
use crate::model::{
    AttachDatastore, AttachDisk, CheckView, ConvertRdm, DatastoreView, DetachDisk, DiskView, ExportView,
    NewDatastore, NewDisk, NewExport, NewRdm, NewVm, RdmView, RegisterVm, RemapRdm, Removal, RepairDisk,
    RepairView, ScanView, VmView,
};
use crate::problem::{Outcome, Problem};

/// Routes of this file.
pub fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(list_datastores, create_datastore))
        .routes(routes!(show_datastore, remove_datastore))
        .routes(routes!(attach_datastore))
        .routes(routes!(check_datastore))
        .routes(routes!(list_disks, create_disk))
        .routes(routes!(show_disk, remove_disk))
        .routes(routes!(list_rdms, create_rdm))
        .routes(routes!(show_rdm))
        .routes(routes!(grow_rdm))
        .routes(routes!(repair_disk))
        .routes(routes!(remap_rdm))
        .routes(routes!(convert_rdm))
        .routes(routes!(scan_rdms))
        .routes(routes!(list_vms, create_vm))
        .routes(routes!(register_vm))
        .routes(routes!(show_vm, remove_vm))
        .routes(routes!(attach_disk))
        .routes(routes!(detach_disk))
        .routes(routes!(list_exports, start_export))
        .routes(routes!(stop_export))
}

/// On which datastore.
#[derive(Debug, serde::Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
struct On {
    /// Its name.
    datastore: Option<String>,
}

/// All datastores.
#[utoipa::path(get, path = "/api/v1/datastores", responses((status = 200, body = Vec<DatastoreView>), (status = "default", body = Problem)))]
async fn list_datastores(State(daemon): State<Shared>) -> Outcome<Json<Vec<DatastoreView>>> {
    daemon.store.ask(move |store| async move { store.datastores().await }).await.map(Json)
}

/// Makes a VMFS datastore on a LUN.
#[utoipa::path(post, path = "/api/v1/datastores", request_body = NewDatastore, params(Dry), responses((status = 200, body = DatastoreView), (status = "default", body = Problem)))]
async fn create_datastore(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<NewDatastore>,
) -> Outcome<Change<DatastoreView>> {
    daemon.store.ask(move |store| async move { store.create_datastore(new, dry.dry_run).await }).await
}

/// One datastore.
#[utoipa::path(get, path = "/api/v1/datastores/{name}", params(("name" = String, Path)), responses((status = 200, body = DatastoreView), (status = "default", body = Problem)))]
async fn show_datastore(
    State(daemon): State<Shared>,
    Path(name): Path<String>,
) -> Outcome<Json<DatastoreView>> {
    daemon.store.ask(move |store| async move { store.show_datastore(&name).await }).await.map(Json)
}

/// Brings a volume on a LUN to this home.
#[utoipa::path(post, path = "/api/v1/datastores/attach", request_body = AttachDatastore, params(Dry), responses((status = 200, body = DatastoreView), (status = "default", body = Problem)))]
async fn attach_datastore(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<AttachDatastore>,
) -> Outcome<Change<DatastoreView>> {
    daemon.store.ask(move |store| async move { store.attach_datastore(new, dry.dry_run).await }).await
}

/// Takes a datastore out of this home; with `all` its LUN goes to the trash.
#[utoipa::path(delete, path = "/api/v1/datastores/{name}", params(("name" = String, Path), Removal), responses((status = 200, body = DatastoreView), (status = "default", body = Problem)))]
async fn remove_datastore(
    State(daemon): State<Shared>,
    Path(name): Path<String>,
    Query(removal): Query<Removal>,
) -> Outcome<Change<DatastoreView>> {
    daemon.store.ask(move |store| async move { store.remove_datastore(&name, removal).await }).await
}

/// Checks a volume.
#[utoipa::path(post, path = "/api/v1/datastores/{name}/check", params(("name" = String, Path)), responses((status = 200, body = CheckView), (status = "default", body = Problem)))]
async fn check_datastore(State(daemon): State<Shared>, Path(name): Path<String>) -> Outcome<Json<CheckView>> {
    daemon.store.ask(move |store| async move { store.check_datastore(&name).await }).await.map(Json)
}

/// Disks on one datastore, or on all.
#[utoipa::path(get, path = "/api/v1/disks", params(On), responses((status = 200, body = Vec<DiskView>), (status = "default", body = Problem)))]
async fn list_disks(State(daemon): State<Shared>, Query(on): Query<On>) -> Outcome<Json<Vec<DiskView>>> {
    daemon.store.ask(move |store| async move { store.disks(on.datastore).await }).await.map(Json)
}

/// Makes a disk on a datastore.
#[utoipa::path(post, path = "/api/v1/disks", request_body = NewDisk, params(Dry), responses((status = 200, body = DiskView), (status = "default", body = Problem)))]
async fn create_disk(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<NewDisk>,
) -> Outcome<Change<DiskView>> {
    daemon.store.ask(move |store| async move { store.create_disk(new, dry.dry_run).await }).await
}

/// One disk.
#[utoipa::path(get, path = "/api/v1/disks/{disk}", params(("disk" = String, Path)), responses((status = 200, body = DiskView), (status = "default", body = Problem)))]
async fn show_disk(State(daemon): State<Shared>, Path(disk): Path<String>) -> Outcome<Json<DiskView>> {
    daemon.store.ask(move |store| async move { store.show_disk(&disk).await }).await.map(Json)
}

/// Removes a disk.
#[utoipa::path(delete, path = "/api/v1/disks/{disk}", params(("disk" = String, Path), Removal), responses((status = 200, body = DiskView), (status = "default", body = Problem)))]
async fn remove_disk(
    State(daemon): State<Shared>,
    Path(disk): Path<String>,
    Query(removal): Query<Removal>,
) -> Outcome<Change<DiskView>> {
    daemon.store.ask(move |store| async move { store.remove_disk(&disk, removal).await }).await
}

/// All mappings.
#[utoipa::path(get, path = "/api/v1/rdms", responses((status = 200, body = Vec<RdmView>), (status = "default", body = Problem)))]
async fn list_rdms(State(daemon): State<Shared>) -> Outcome<Json<Vec<RdmView>>> {
    daemon.store.ask(move |store| async move { store.rdms().await }).await.map(Json)
}

/// Maps a LUN.
#[utoipa::path(post, path = "/api/v1/rdms", request_body = NewRdm, params(Dry), responses((status = 200, body = RdmView), (status = "default", body = Problem)))]
async fn create_rdm(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<NewRdm>,
) -> Outcome<Change<RdmView>> {
    daemon.store.ask(move |store| async move { store.create_rdm(new, dry.dry_run).await }).await
}

/// One mapping.
#[utoipa::path(get, path = "/api/v1/rdms/{disk}", params(("disk" = String, Path)), responses((status = 200, body = RdmView), (status = "default", body = Problem)))]
async fn show_rdm(State(daemon): State<Shared>, Path(disk): Path<String>) -> Outcome<Json<RdmView>> {
    daemon.store.ask(move |store| async move { store.show_rdm(&disk).await }).await.map(Json)
}

/// Takes over the size of a LUN that has grown.
#[utoipa::path(post, path = "/api/v1/rdms/{disk}/grow", params(("disk" = String, Path), Dry), responses((status = 200, body = RdmView), (status = "default", body = Problem)))]
async fn grow_rdm(
    State(daemon): State<Shared>,
    Path(disk): Path<String>,
    Query(dry): Query<Dry>,
) -> Outcome<Change<RdmView>> {
    daemon.store.ask(move |store| async move { store.grow_rdm(&disk, dry.dry_run).await }).await
}

/// Joins links of a chain that do not fit together any more.
#[utoipa::path(post, path = "/api/v1/disks/{disk}/repair", request_body = RepairDisk, params(("disk" = String, Path), Dry), responses((status = 200, body = RepairView), (status = "default", body = Problem)))]
async fn repair_disk(
    State(daemon): State<Shared>,
    Path(disk): Path<String>,
    Query(dry): Query<Dry>,
    Body(new): Body<RepairDisk>,
) -> Outcome<Change<RepairView>> {
    daemon.store.ask(move |store| async move { store.repair_disk(&disk, new, dry.dry_run).await }).await
}

/// Points a mapping at another LUN.
#[utoipa::path(post, path = "/api/v1/rdms/{disk}/remap", request_body = RemapRdm, params(("disk" = String, Path), Dry), responses((status = 200, body = RdmView), (status = "default", body = Problem)))]
async fn remap_rdm(
    State(daemon): State<Shared>,
    Path(disk): Path<String>,
    Query(dry): Query<Dry>,
    Body(new): Body<RemapRdm>,
) -> Outcome<Change<RdmView>> {
    daemon.store.ask(move |store| async move { store.remap_rdm(&disk, new, dry.dry_run).await }).await
}

/// Changes the compatibility mode.
#[utoipa::path(post, path = "/api/v1/rdms/{disk}/convert", request_body = ConvertRdm, params(("disk" = String, Path), Dry), responses((status = 200, body = RdmView), (status = "default", body = Problem)))]
async fn convert_rdm(
    State(daemon): State<Shared>,
    Path(disk): Path<String>,
    Query(dry): Query<Dry>,
    Body(new): Body<ConvertRdm>,
) -> Outcome<Change<RdmView>> {
    daemon.store.ask(move |store| async move { store.convert_rdm(&disk, new, dry.dry_run).await }).await
}

/// Compares the three places of all identities; rebuilds what is lost unless it is a dry run.
#[utoipa::path(post, path = "/api/v1/rdms/scan", params(Dry), responses((status = 200, body = ScanView), (status = "default", body = Problem)))]
async fn scan_rdms(State(daemon): State<Shared>, Query(dry): Query<Dry>) -> Outcome<Json<ScanView>> {
    daemon.store.ask(move |store| async move { store.scan_rdms(!dry.dry_run).await }).await.map(Json)
}

/// All VMs.
#[utoipa::path(get, path = "/api/v1/vms", responses((status = 200, body = Vec<VmView>), (status = "default", body = Problem)))]
async fn list_vms(State(daemon): State<Shared>) -> Outcome<Json<Vec<VmView>>> {
    daemon.store.ask(move |store| async move { store.vms().await }).await.map(Json)
}

/// Makes a VM.
#[utoipa::path(post, path = "/api/v1/vms", request_body = NewVm, params(Dry), responses((status = 200, body = VmView), (status = "default", body = Problem)))]
async fn create_vm(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<NewVm>,
) -> Outcome<Change<VmView>> {
    daemon.store.ask(move |store| async move { store.create_vm(new, dry.dry_run).await }).await
}

/// Registers a VM that lies on a datastore.
#[utoipa::path(post, path = "/api/v1/vms/register", request_body = RegisterVm, params(Dry), responses((status = 200, body = VmView), (status = "default", body = Problem)))]
async fn register_vm(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<RegisterVm>,
) -> Outcome<Change<VmView>> {
    daemon.store.ask(move |store| async move { store.register_vm(new, dry.dry_run).await }).await
}

/// One VM.
#[utoipa::path(get, path = "/api/v1/vms/{name}", params(("name" = String, Path)), responses((status = 200, body = VmView), (status = "default", body = Problem)))]
async fn show_vm(State(daemon): State<Shared>, Path(name): Path<String>) -> Outcome<Json<VmView>> {
    daemon.store.ask(move |store| async move { store.show_vm(&name).await }).await.map(Json)
}

/// Plugs a disk into a VM.
#[utoipa::path(post, path = "/api/v1/vms/{name}/attach", request_body = AttachDisk, params(("name" = String, Path), Dry), responses((status = 200, body = VmView), (status = "default", body = Problem)))]
async fn attach_disk(
    State(daemon): State<Shared>,
    Path(name): Path<String>,
    Query(dry): Query<Dry>,
    Body(new): Body<AttachDisk>,
) -> Outcome<Change<VmView>> {
    daemon.store.ask(move |store| async move { store.attach_disk(&name, new, dry.dry_run).await }).await
}

/// Unplugs a disk from a VM.
#[utoipa::path(post, path = "/api/v1/vms/{name}/detach", request_body = DetachDisk, params(("name" = String, Path), Dry), responses((status = 200, body = VmView), (status = "default", body = Problem)))]
async fn detach_disk(
    State(daemon): State<Shared>,
    Path(name): Path<String>,
    Query(dry): Query<Dry>,
    Body(new): Body<DetachDisk>,
) -> Outcome<Change<VmView>> {
    daemon.store.ask(move |store| async move { store.detach_disk(&name, new, dry.dry_run).await }).await
}

/// Unregisters a VM; with `all` its files go too.
#[utoipa::path(delete, path = "/api/v1/vms/{name}", params(("name" = String, Path), Removal), responses((status = 200, body = VmView), (status = "default", body = Problem)))]
async fn remove_vm(
    State(daemon): State<Shared>,
    Path(name): Path<String>,
    Query(removal): Query<Removal>,
) -> Outcome<Change<VmView>> {
    daemon.store.ask(move |store| async move { store.remove_vm(&name, removal).await }).await
}

/// All exports.
#[utoipa::path(get, path = "/api/v1/exports", responses((status = 200, body = Vec<ExportView>), (status = "default", body = Problem)))]
async fn list_exports(State(daemon): State<Shared>) -> Outcome<Json<Vec<ExportView>>> {
    daemon.store.ask(move |store| async move { store.exports().await }).await.map(Json)
}

/// Serves something over NBD.
#[utoipa::path(post, path = "/api/v1/exports", request_body = NewExport, params(Dry), responses((status = 200, body = ExportView), (status = "default", body = Problem)))]
async fn start_export(
    State(daemon): State<Shared>,
    Query(dry): Query<Dry>,
    Body(new): Body<NewExport>,
) -> Outcome<Change<ExportView>> {
    daemon.store.ask(move |store| async move { store.start_export(new, dry.dry_run).await }).await
}

/// Stops serving it.
#[utoipa::path(delete, path = "/api/v1/exports/{name}", params(("name" = String, Path), Removal), responses((status = 200, body = ExportView), (status = "default", body = Problem)))]
async fn stop_export(
    State(daemon): State<Shared>,
    Path(name): Path<String>,
    Query(removal): Query<Removal>,
) -> Outcome<Change<ExportView>> {
    daemon.store.ask(move |store| async move { store.stop_export(&name, removal).await }).await
}
