//! Requests, and what is answered.

use std::{collections::BTreeMap, io, sync::Arc};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited, channel::Channel, combinators::UnsyncBoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue},
};
use serde_json::{Value, json};

use super::{
    Asked, Shared, TOKEN, discovery, event,
    store::{Gone, Page, Resource, Selector},
    table,
    watch::Watch,
};

/// A body, of any kind.
pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// How large a request may be, in bytes.
const MAX_REQUEST: usize = 1 << 20;

/// What a request is about.
struct Target {
    resource: Resource,
    /// Events have two versions of themselves.
    group: &'static str,
    namespace: Option<String>,
    name: Option<String>,
}

impl Target {
    fn parse(path: &str) -> Option<Self> {
        let mut rest = path.trim_start_matches('/').split('/').peekable();
        let group = match rest.next()? {
            "api" => "",
            "apis" => *rest.peek()?,
            _ => return None,
        };
        rest.next_if_eq(&group);
        rest.next_if_eq(&"v1")?;
        let namespace = rest.next_if_eq(&"namespaces").and_then(|_| rest.next()).map(ToOwned::to_owned);
        let plural = rest.next()?;
        let resource = Resource::in_group(group).find(|resource| resource.plural() == plural)?;
        let group = if group.is_empty() { "" } else { resource.group() };
        let name = rest.next().map(ToOwned::to_owned);
        rest.next().is_none().then_some(Self { resource, group, namespace, name })
    }

    /// The resource as RBAC has it.
    fn full_name(&self) -> String {
        let plural = self.resource.plural();
        if self.group.is_empty() { plural.to_owned() } else { format!("{plural}.{}", self.group) }
    }

    fn kind(&self) -> &'static str {
        self.resource.kind()
    }

    fn api_version(&self) -> String {
        if self.group.is_empty() { "v1".to_owned() } else { format!("{}/v1", self.group) }
    }

    /// An object in the version asked for.
    fn shown(&self, object: &Value) -> Value {
        let mut object = match (self.resource, self.group) {
            (Resource::Events, "") => event::as_core(object),
            _ => object.clone(),
        };
        object["kind"] = self.kind().into();
        object["apiVersion"] = self.api_version().into();
        object
    }
}

/// Answers one request.
pub(super) async fn answer(shared: &Arc<Shared>, request: Request<Incoming>) -> Response<Body> {
    let query: BTreeMap<String, String> = pairs(request.uri().query().unwrap_or_default());
    let target = Target::parse(request.uri().path());
    shared.remember(asked(&request, target.as_ref(), &query));

    let faults = shared.faults();
    tokio::time::sleep(faults.delay).await;
    let Some(target) = target else {
        return match discovery::answer(request.uri().path()) {
            Some(value) => success(StatusCode::OK, &value),
            None => failure(404, "NotFound", "the server could not find the requested resource"),
        };
    };
    if let Some(status) = faults.status {
        let reason = if status == 403 { "Forbidden" } else { "InternalError" };
        return failure(status, reason, &format!("{} is not to be had", target.full_name()));
    }
    let table = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok());
    let table = table.is_some_and(|accept| accept.contains("as=Table"));
    match *request.method() {
        Method::GET => read(shared, &target, &query, table),
        Method::POST if target.resource == Resource::Events && target.name.is_none() => {
            create(shared, &target, request.into_body()).await
        }
        _ => failure(405, "MethodNotAllowed", "this server makes Events and reads what there is"),
    }
}

fn asked(request: &Request<Incoming>, target: Option<&Target>, query: &BTreeMap<String, String>) -> Asked {
    let verb = match (request.method(), target) {
        (_, None) => "discover",
        (&Method::GET, Some(_)) if is_watch(query) => "watch",
        (&Method::GET, Some(Target { name: None, .. })) => "list",
        (&Method::GET, _) => "get",
        (&Method::POST, _) => "create",
        (&Method::PATCH, _) => "patch",
        (&Method::DELETE, _) => "delete",
        _ => "update",
    };
    let token = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    Asked {
        verb,
        token: token.and_then(|value| value.strip_prefix("Bearer ")) == Some(TOKEN),
        resource: target.map_or_else(|| request.uri().path().to_owned(), Target::full_name),
        namespace: target.and_then(|target| target.namespace.clone()),
        name: target.and_then(|target| target.name.clone()),
        query: query.clone(),
    }
}

fn is_watch(query: &BTreeMap<String, String>) -> bool {
    query.get("watch").is_some_and(|value| value == "1" || value == "true")
}

fn read(
    shared: &Arc<Shared>,
    target: &Target,
    query: &BTreeMap<String, String>,
    table: bool,
) -> Response<Body> {
    if let Some(name) = &target.name {
        let namespace = target.namespace.as_deref().unwrap_or_default();
        let Some(object) = shared.store().get(target.resource, namespace, name) else {
            return failure(404, "NotFound", &format!("{} \"{name}\" not found", target.full_name()));
        };
        let object = target.shown(&object);
        return success(
            StatusCode::OK,
            &if table { table::of(target.kind(), &[object], json!({})) } else { object },
        );
    }
    let text = |name: &str| query.get(name).map(String::as_str).unwrap_or_default();
    // As core/v1 calls it.
    let fields = text("fieldSelector").replace("involvedObject.", "regarding.");
    let Some(selector) = Selector::new(target.namespace.as_deref(), &fields) else {
        return failure(400, "BadRequest", "unable to parse the field selector");
    };
    if is_watch(query) {
        return watch(shared, target, query, selector);
    }
    let limit = text("limit").parse().unwrap_or_default();
    let page = match text("continue") {
        token if !token.is_empty() && shared.faults().lists_expire => Err(Gone),
        "" => Ok(shared.store().list(target.resource, &selector, limit)),
        token => shared.store().list_on(token, limit),
    };
    let Ok(Page { items, version, next }) = page else {
        return failure(410, "Expired", "The provided continue parameter is too old");
    };
    let items: Vec<Value> = items.iter().map(|object| target.shown(object)).collect();
    let metadata = json!({ "resourceVersion": version.to_string(), "continue": next });
    let list = if table {
        table::of(target.kind(), &items, metadata)
    } else {
        let kind = format!("{}List", target.kind());
        json!({ "kind": kind, "apiVersion": target.api_version(), "metadata": metadata, "items": items })
    };
    success(StatusCode::OK, &list)
}

fn watch(
    shared: &Arc<Shared>,
    target: &Target,
    query: &BTreeMap<String, String>,
    selector: Selector,
) -> Response<Body> {
    let number = |name: &str| query.get(name).and_then(|text| text.parse::<u64>().ok());
    let from = number("resourceVersion").unwrap_or_default();
    let (resource, kind) = (target.resource, target.kind());
    if shared.faults().gone_by_status && shared.store().since(from, resource, &selector).is_err() {
        return failure(410, "Expired", "too old resource version");
    }
    let bookmarks = query.get("allowWatchBookmarks").is_some_and(|value| value == "true");
    let watch = Watch { shared: Arc::clone(shared), resource, kind, selector, bookmarks };
    let (sender, body) = Channel::new(16);
    tokio::spawn(watch.run(from, number("timeoutSeconds"), sender));
    respond(StatusCode::OK, body.boxed_unsync())
}

async fn create(shared: &Arc<Shared>, target: &Target, body: Incoming) -> Response<Body> {
    let Ok(body) = Limited::new(body, MAX_REQUEST).collect().await else {
        return failure(413, "RequestEntityTooLarge", "the request is too large");
    };
    let Ok(event) = serde_json::from_slice::<Value>(&body.to_bytes()) else {
        return failure(400, "BadRequest", "the request is not JSON");
    };
    if let Err(why) = event::check(&event, target.namespace.as_deref()) {
        return failure(422, "Invalid", &why);
    }
    let text = |field: &str| event["metadata"][field].as_str().unwrap_or_default().to_owned();
    let (namespace, name) = (text("namespace"), text("name"));
    if shared.store().get(Resource::Events, &namespace, &name).is_some() {
        return failure(409, "AlreadyExists", &format!("events \"{name}\" already exists"));
    }
    shared.change(|store| store.put(Resource::Events, event));
    let made = shared.store().get(Resource::Events, &namespace, &name);
    success(StatusCode::CREATED, &target.shown(&made.unwrap_or_default()))
}

fn success(status: StatusCode, value: &Value) -> Response<Body> {
    let body = Full::new(Bytes::from(value.to_string()));
    respond(status, body.map_err(|never| match never {}).boxed_unsync())
}

/// What went wrong, as Kubernetes puts it.
pub(super) fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}

fn failure(code: u16, reason: &str, message: &str) -> Response<Body> {
    let http = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    success(http, &status(code, reason, message))
}

fn respond(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The pairs of a query.
fn pairs(query: &str) -> BTreeMap<String, String> {
    let decoded = |text: &str| {
        let text = text.replace('+', " ");
        percent_encoding::percent_decode_str(&text).decode_utf8_lossy().into_owned()
    };
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (decoded(name), decoded(value))).collect()
}
