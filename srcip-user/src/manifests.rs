//! Kubernetes objects in files: YAML or JSON, one object or several, lists included.

use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// How many files of a directory are read.
const MAX_FILES: usize = 4096;

/// One object of a file, with what it says it is.
#[derive(Clone, Debug)]
pub struct Object {
    /// `Pod`, `Service` and so on; empty if it does not say.
    pub kind: String,
    /// Its `metadata.name`, for messages.
    pub name: String,
    /// All of it.
    pub value: Value,
}

impl Object {
    /// The object as the type that its kind stands for.
    pub fn into_typed<T: DeserializeOwned>(self) -> Result<T> {
        let Self { kind, name, value } = self;
        serde_json::from_value(value)
            .with_context(|| format!("the {kind} {name:?} is not as Kubernetes would have it"))
    }
}

/// The `.yaml`, `.yml` and `.json` files of a directory, in the order of their names. Hidden ones are
/// those of editors, or of a ConfigMap's volume behind the links that lead to them.
pub fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let failed = || format!("failed to read the manifests in {}", directory.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).with_context(failed)? {
        let path = entry.with_context(failed)?.path();
        let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        let extension = path.extension().and_then(|extension| extension.to_str());
        if hidden || !matches!(extension, Some("yaml" | "yml" | "json")) {
            continue;
        }
        if paths.len() == MAX_FILES {
            bail!(
                "{} has more than {MAX_FILES} manifests; put more objects into a file",
                directory.display()
            );
        }
        paths.push(path);
    }
    paths.sort();
    Ok(paths)
}

/// The objects of a file of at most `limit` bytes.
pub fn read(path: &Path, limit: u64) -> Result<Vec<Object>> {
    let text = read_text(path, limit)?;
    // What goes wrong here ends up in logs and probes, which have lines, not pages.
    let options = serde_saphyr::options! { with_snippet: false };
    let documents: Vec<Value> = serde_saphyr::from_multiple_with_options(&text, options)
        .with_context(|| format!("{} is not YAML", path.display()))?;
    let mut objects = Vec::new();
    for document in documents {
        unfold(document, None, &mut objects);
    }
    Ok(objects)
}

fn read_text(path: &Path, limit: u64) -> Result<String> {
    let failed = || format!("failed to read {}", path.display());
    // A FIFO would keep whoever opens it waiting.
    let options = File::options().read(true).custom_flags(libc::O_NONBLOCK).clone();
    let file = options.open(path).with_context(failed)?;
    let metadata = file.metadata().with_context(failed)?;
    if !metadata.is_file() {
        bail!("{} is no file", path.display());
    }
    if metadata.len() > limit {
        bail!(
            "{} has {} bytes; manifests of more than {} MiB are not read",
            path.display(),
            metadata.len(),
            limit >> 20
        );
    }
    let mut text = String::new();
    // It may have grown since.
    file.take(limit).read_to_string(&mut text).with_context(failed)?;
    Ok(text)
}

/// Adds an object; of a list, what is in it. The items of a PodList need not say what they are.
fn unfold(mut value: Value, kind_in_list: Option<&str>, objects: &mut Vec<Object>) {
    let kind = value["kind"].as_str().or(kind_in_list).unwrap_or_default().to_owned();
    if let Some(item_kind) = kind.strip_suffix("List")
        && let Some(items) = value.get_mut("items").and_then(Value::as_array_mut)
    {
        for item in std::mem::take(items) {
            // A `List` is of anything, lists included: as deep as the parser lets YAML nest.
            unfold(item, Some(item_kind).filter(|kind| !kind.is_empty()), objects);
        }
    } else if value.is_object() {
        let name = value["metadata"]["name"].as_str().unwrap_or("without a name").to_owned();
        objects.push(Object { kind, name, value });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(text: &str) -> Vec<(String, String)> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, text).unwrap();
        let objects = read(file.path(), 1 << 20).unwrap();
        objects.into_iter().map(|object| (object.kind, object.name)).collect()
    }

    fn pair(kind: &str, name: &str) -> (String, String) {
        (kind.to_owned(), name.to_owned())
    }

    #[test]
    fn documents_and_lists_are_unfolded() {
        let text = "---\nkind: Pod\nmetadata: {name: a}\n---\nkind: PodList\nitems: [{metadata: {name: b}}]\n\
                    ---\nkind: List\nitems:\n- kind: Service\n  metadata: {name: c}\n- kind: PodList\n  items:\n  \
                    - {kind: Pod, metadata: {name: d}}\n";
        let expected = [pair("Pod", "a"), pair("Pod", "b"), pair("Service", "c"), pair("Pod", "d")];
        assert_eq!(objects(text), expected);
        assert_eq!(objects(r#"{"kind": "Pod", "metadata": {}}"#), [pair("Pod", "without a name")]);
        assert_eq!(objects(""), []);
        assert_eq!(objects("- 1\n- x\n---\n~\n"), []);
    }

    #[test]
    fn what_is_not_yaml_too_large_or_no_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.yaml");
        fs::write(&path, "kind: [").unwrap();
        let error = format!("{:#}", read(&path, 1 << 20).unwrap_err());
        assert!(error.contains("is not YAML: ") && error.lines().count() == 1, "{error}");
        fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap();
        assert!(read(&path, 1 << 20).unwrap_err().to_string().contains("more than 1 MiB"));
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(read(&path, 1 << 20).unwrap_err().to_string().contains("is no file"));
    }

    #[test]
    fn files_are_sorted_and_hidden_ones_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["b.json", "a.yaml", ".a.yaml", "c.txt", "d.yml", "e.yaml~"] {
            fs::write(directory.path().join(name), "").unwrap();
        }
        let names: Vec<_> = files(directory.path()).unwrap();
        let names: Vec<_> = names.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["a.yaml", "b.json", "d.yml"]);
    }
}
