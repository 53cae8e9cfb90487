//! The daemon itself, and its metrics.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Shared;
use crate::metrics::Seen;
use crate::model::DaemonView;
use crate::problem::Outcome;

/// Routes of this file.
pub fn routes() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(show_daemon))
        .routes(routes!(stop_daemon))
        .routes(routes!(metrics))
        .routes(routes!(super::events::events))
}

async fn view(daemon: &Shared) -> DaemonView {
    let (nbd, troubles) =
        daemon.store.ask(|store| async move { (store.nbd_addresses(), store.troubles()) }).await;
    DaemonView {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        home: daemon.home.dir().to_owned(),
        started_at: daemon.started.to_string(),
        nbd,
        troubles,
    }
}

/// The running daemon.
#[utoipa::path(get, path = "/api/v1/daemon", responses((status = 200, body = DaemonView)))]
async fn show_daemon(State(daemon): State<Shared>) -> Json<DaemonView> {
    Json(view(&daemon).await)
}

/// Asks the daemon to end: jobs stop where everything is in order and go on at the next start.
#[utoipa::path(post, path = "/api/v1/daemon/stop", responses((status = 200, body = DaemonView)))]
async fn stop_daemon(State(daemon): State<Shared>) -> Json<DaemonView> {
    let view = view(&daemon).await;
    daemon.stop.send_replace(true);
    Json(view)
}

/// Metrics in the text format of Prometheus.
#[utoipa::path(get, path = "/metrics", responses((status = 200, content_type = "text/plain", body = String)))]
async fn metrics(State(daemon): State<Shared>) -> Outcome<Response> {
    let ask = |store: std::rc::Rc<crate::store::Store>| async move {
        let (pools, luns) = (store.pools().await?, store.luns(false).await?);
        let (datastores, vms) = (store.datastores().await?, store.vms().await?);
        Ok(Seen { pools, luns, datastores, vms, exports: store.export_counts() })
    };
    let seen = daemon.store.ask(ask).await?;
    let text = daemon.metrics.render(&seen);
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}
