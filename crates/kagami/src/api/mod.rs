//! REST under `/api/v1`. The OpenAPI text at `/api/openapi.json` is generated from these handlers. Errors are
//! `application/problem+json` with our stable codes; every changing request takes `?dry_run=true`.

mod backups;
mod events;
mod luns;
mod once;
mod system;
mod tags;
mod vms;

use std::sync::Arc;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, OptionalFromRequest, Request};
use axum::http::{StatusCode, header, request::Parts};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::{IntoParams, OpenApi};
use utoipa_axum::router::OpenApiRouter;

pub use events::Events;
pub use once::Replies;

use crate::home::Home;
use crate::jobs::Jobs;
use crate::metrics::Metrics;
use crate::model::Plan;
use crate::problem::{Kind, Problem};
use crate::store::RemoteStore;

/// What the handlers share.
pub struct Daemon {
    /// The home.
    pub home: Home,
    /// Pools, datastores, VMs, exports, on their lane.
    pub store: RemoteStore,
    /// Long work.
    pub jobs: Jobs,
    /// For `/metrics`.
    pub metrics: Arc<Metrics>,
    /// Whoever listens to what happens.
    pub events: Events,
    /// Answers to requests that had an idempotency key.
    pub replies: Replies,
    /// True stops the daemon.
    pub stop: watch::Sender<bool>,
    /// When it started.
    pub started: jiff::Timestamp,
}

/// State of every handler.
pub type Shared = Arc<Daemon>;

#[derive(OpenApi)]
#[openapi(info(
    title = "kagami",
    description = "VM storage with raw device mapping, snapshots, clones and online backup",
    license(name = "MIT OR Apache-2.0")
))]
struct Document;

/// All routes.
pub fn router(daemon: Shared) -> Router {
    let routes = OpenApiRouter::with_openapi(Document::openapi())
        .merge(luns::routes())
        .merge(vms::routes())
        .merge(backups::routes())
        .merge(system::routes());
    let (router, document) = routes.split_for_parts();
    let text: Arc<str> = document.to_json().unwrap_or_default().into(); // plain data always serialises
    let served = router
        .route(
            "/api/openapi.json",
            axum::routing::get(move || {
                let text = Arc::clone(&text);
                async move { ([(header::CONTENT_TYPE, "application/json")], text.to_string()) }
            }),
        )
        .fallback(|| async {
            Problem::new("KGM-API-0404", Kind::NotFound, "there is no such resource")
                .hint("GET /api/openapi.json lists what there is")
        })
        .method_not_allowed_fallback(|| async {
            Problem::new("KGM-API-0405", Kind::Usage, "the resource does not do that")
                .hint("GET /api/openapi.json lists what it does")
        })
        .with_state(Arc::clone(&daemon));
    // Around the whole, not around each handler: a conditional change looks at the object by the GET of its path.
    Router::new()
        .fallback_service(served)
        .layer(axum::middleware::from_fn(tags::tags))
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&daemon), events::tell_changes))
        .layer(axum::middleware::from_fn_with_state(daemon, once::once))
}

/// `?dry_run=true`: say what would be done.
#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Dry {
    /// Only say what would be done.
    #[serde(default)]
    pub dry_run: bool,
}

/// Answer of a changing request: done, or what would be done.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Change<T> {
    /// It was done.
    Done(T),
    /// It would be done like this.
    Would(Plan),
}

impl<T> Change<T> {
    /// What would be done, in one step that loses nothing.
    pub fn would(step: impl Into<String>) -> Self {
        Self::Would(Plan { would: vec![step.into()], ..Plan::default() })
    }
}

impl<T: Serialize> IntoResponse for Change<T> {
    fn into_response(self) -> Response {
        Json(self).into_response()
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        #[derive(Serialize)]
        struct Body<'a> {
            r#type: String,
            status: u16,
            #[serde(flatten)]
            problem: &'a Problem,
        }
        let status = self.kind.status();
        let body = Body { r#type: format!("urn:kagami:problem:{}", self.code), status, problem: &self };
        let text = serde_json::to_string(&body).unwrap_or_default(); // plain data always serialises
        let code = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (code, [(header::CONTENT_TYPE, "application/problem+json")], text).into_response()
    }
}

/// A JSON body; what is wrong with it is a problem like all others.
pub struct Body<T>(pub T);

fn bad_body(rejection: JsonRejection) -> Problem {
    Problem::new("KGM-API-0400", Kind::Usage, "the request's body was not understood")
        .why(rejection.body_text())
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Problem;
    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        match <Json<T> as FromRequest<S>>::from_request(request, state).await {
            Ok(Json(body)) => Ok(Self(body)),
            Err(rejection) => Err(bad_body(rejection)),
        }
    }
}

impl<T: DeserializeOwned, S: Send + Sync> OptionalFromRequest<S> for Body<T> {
    type Rejection = Problem;
    async fn from_request(request: Request, state: &S) -> Result<Option<Self>, Problem> {
        match <Json<T> as OptionalFromRequest<S>>::from_request(request, state).await {
            Ok(body) => Ok(body.map(|Json(body)| Self(body))),
            Err(rejection) => Err(bad_body(rejection)),
        }
    }
}

/// A query string; what is wrong with it is a problem like all others.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let read: Result<axum::extract::Query<T>, QueryRejection> =
            axum::extract::Query::from_request_parts(parts, state).await;
        match read {
            Ok(axum::extract::Query(query)) => Ok(Self(query)),
            Err(rejection) => Err(Problem::new("KGM-API-0401", Kind::Usage, "the query was not understood")
                .why(rejection.body_text())),
        }
    }
}
