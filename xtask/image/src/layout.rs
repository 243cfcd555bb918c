//! An image as an archive: the OCI image layout, in a tar file.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Read, Seek as _, SeekFrom, Write},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use anyhow::{Context as _, Result};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::Builder;

use crate::tree::Tree;

/// An image of one layer, for Linux.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its files.
    pub tree: Tree,
    /// The processor, by Go's name: `amd64`, `arm64`.
    pub architecture: String,
    /// The program that a container starts, with its first arguments.
    pub entrypoint: Vec<String>,
    /// Whom it runs as: `0`, `1337:1337`.
    pub user: String,
    /// What a runtime sends to end it.
    pub stop_signal: String,
    /// Names and values that tell where it is from.
    pub labels: BTreeMap<String, String>,
    /// Whether the layer is compressed. It is smaller then, and takes longer to write and to unpack.
    pub compressed: bool,
}

/// An image that has been written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The name under which a runtime will know it.
    pub name: String,
    /// The digest of its manifest: `sha256:…`.
    pub digest: String,
    /// Bytes of the archive.
    pub size: u64,
    /// Bytes of the files.
    pub unpacked: u64,
}

/// Something in the layout that is named by its digest.
struct Blob {
    media_type: &'static str,
    digest: String,
    size: u64,
}

impl Blob {
    fn descriptor(&self) -> Value {
        json!({ "mediaType": self.media_type, "digest": format!("sha256:{}", self.digest), "size": self.size })
    }

    fn path(&self) -> String {
        format!("blobs/sha256/{}", self.digest)
    }
}

/// A writer that knows what went through it.
struct Hashing<W> {
    inner: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Hashing<W> {
    fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new(), size: 0 }
    }

    fn finish(self) -> (String, u64, W) {
        (hex(&self.hash.finalize()), self.size, self.inner)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Image {
    /// Writes it as `name` (`srcip:0.1.0`, `registry.example/srcip:0.1.0`) to the file `to`.
    pub fn write(&self, name: &str, to: &Path) -> Result<Written> {
        let directory = to.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Some(directory) = directory {
            fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        }
        // Beside its place, so that nobody finds half an image there.
        let file = tempfile::Builder::new()
            .permissions(fs::Permissions::from_mode(0o644))
            .tempfile_in(directory.unwrap_or(Path::new(".")))
            .with_context(|| format!("writing beside {}", to.display()))?;
        let (mut layer_file, layer, diff_id, unpacked) = self.write_layer()?;
        let config = self.config(&diff_id).to_string();
        let config_blob = blob("application/vnd.oci.image.config.v1+json", &config);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config_blob.descriptor(),
            "layers": [layer.descriptor()],
        })
        .to_string();
        let manifest_blob = blob("application/vnd.oci.image.manifest.v1+json", &manifest);
        let name = full_name(name);
        let mut entry = manifest_blob.descriptor();
        entry["platform"] = json!({ "architecture": self.architecture, "os": "linux" });
        // containerd names the image by the first of these, podman and skopeo by the second.
        entry["annotations"] = json!({
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": name,
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [entry],
        })
        .to_string();

        let mut archive = Builder::new(BufWriter::new(file));
        let mut text =
            |path: &str, text: &str| append(&mut archive, path, text.len() as u64, text.as_bytes());
        text("oci-layout", &json!({ "imageLayoutVersion": "1.0.0" }).to_string())?;
        text("index.json", &index)?;
        text(&manifest_blob.path(), &manifest)?;
        text(&config_blob.path(), &config)?;
        layer_file.seek(SeekFrom::Start(0))?;
        append(&mut archive, &layer.path(), layer.size, layer_file)?;
        let file = archive.into_inner()?.into_inner()?;
        let size = file.as_file().metadata()?.len();
        file.persist(to).with_context(|| format!("writing {}", to.display()))?;
        Ok(Written { name, digest: format!("sha256:{}", manifest_blob.digest), size, unpacked })
    }

    /// The layer, in a file without a name; its digest, and that of what it is when unpacked.
    fn write_layer(&self) -> Result<(File, Blob, String, u64)> {
        let outer = Hashing::new(BufWriter::new(tempfile::tempfile().context("making a temporary file")?));
        let (media_type, outer, diff_id, unpacked) = if self.compressed {
            let mut inner = Hashing::new(GzEncoder::new(outer, Compression::default()));
            self.tree.write(&mut inner)?;
            let (diff_id, unpacked, encoder) = inner.finish();
            ("application/vnd.oci.image.layer.v1.tar+gzip", encoder.finish()?, diff_id, unpacked)
        } else {
            let mut outer = outer;
            self.tree.write(&mut outer)?;
            let (diff_id, unpacked) = (hex(&outer.hash.clone().finalize()), outer.size);
            ("application/vnd.oci.image.layer.v1.tar", outer, diff_id, unpacked)
        };
        let (digest, size, writer) = outer.finish();
        let file = writer.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok((file, Blob { media_type, digest, size }, diff_id, unpacked))
    }

    fn config(&self, diff_id: &str) -> Value {
        json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": {
                "Entrypoint": self.entrypoint,
                "User": self.user,
                "StopSignal": self.stop_signal,
                "Labels": self.labels,
                "WorkingDir": "/",
            },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{diff_id}")] },
        })
    }
}

fn blob(media_type: &'static str, text: &str) -> Blob {
    Blob { media_type, digest: hex(&Sha256::digest(text)), size: text.len() as u64 }
}

fn append(archive: &mut Builder<impl Write>, path: &str, size: u64, contents: impl Read) -> Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(size);
    header.set_mtime(0);
    archive.append_data(&mut header, path, contents).with_context(|| format!("writing {path}"))
}

/// The name with its registry, as Kubernetes and containerd complete a short one.
fn full_name(name: &str) -> String {
    let tagged = match name.rsplit('/').next() {
        Some(last) if !last.contains([':', '@']) => format!("{name}:latest"),
        _ => name.to_owned(),
    };
    match tagged.split_once('/') {
        Some((registry, _)) if registry.contains(['.', ':']) || registry == "localhost" => tagged,
        Some(_) => format!("docker.io/{tagged}"),
        None => format!("docker.io/library/{tagged}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(compressed: bool) -> Image {
        let mut tree = Tree::default();
        tree.bytes("app", vec![7; 100_000], 0o755);
        Image {
            tree,
            architecture: "amd64".to_owned(),
            entrypoint: vec!["/app".to_owned()],
            user: "0".to_owned(),
            stop_signal: "SIGTERM".to_owned(),
            labels: BTreeMap::new(),
            compressed,
        }
    }

    #[test]
    fn the_same_input_gives_the_same_bytes() {
        let directory = tempfile::tempdir().unwrap();
        for compressed in [false, true] {
            let [one, two] = ["one", "two"].map(|name| {
                let path = directory.path().join(name);
                let written = image(compressed).write("app:1", &path).unwrap();
                (written, fs::read(path).unwrap())
            });
            assert!(one == two);
            assert_eq!(one.0.size, one.1.len() as u64);
        }
    }

    #[test]
    fn every_digest_is_that_of_what_it_names() {
        let directory = tempfile::tempdir().unwrap();
        for compressed in [false, true] {
            let path = directory.path().join("image.tar");
            let written = image(compressed).write("app:1", &path).unwrap();
            let mut blobs = BTreeMap::new();
            for entry in tar::Archive::new(File::open(&path).unwrap()).entries().unwrap() {
                let mut entry = entry.unwrap();
                let path = entry.path().unwrap().display().to_string();
                let mut contents = Vec::new();
                entry.read_to_end(&mut contents).unwrap();
                if let Some(digest) = path.strip_prefix("blobs/sha256/") {
                    assert_eq!(digest, hex(&Sha256::digest(&contents)));
                }
                blobs.insert(path, contents);
            }
            let json = |path: &str| -> Value { serde_json::from_slice(&blobs[path]).unwrap() };
            let named = |value: &Value| {
                format!("blobs/sha256/{}", value["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap())
            };
            let index = json("index.json");
            assert_eq!(index["manifests"][0]["digest"], json!(written.digest));
            let manifest = json(&named(&index["manifests"][0]));
            let config = json(&named(&manifest["config"]));
            let layer = &blobs[&named(&manifest["layers"][0])];
            assert_eq!(manifest["layers"][0]["size"], json!(layer.len()));
            let unpacked = if compressed {
                let mut unpacked = Vec::new();
                flate2::read::GzDecoder::new(layer.as_slice()).read_to_end(&mut unpacked).unwrap();
                unpacked
            } else {
                layer.clone()
            };
            let diff_id = format!("sha256:{}", hex(&Sha256::digest(&unpacked)));
            assert_eq!(config["rootfs"]["diff_ids"][0], json!(diff_id));
            assert_eq!(written.unpacked, unpacked.len() as u64);
        }
    }

    #[test]
    fn names_are_completed_as_runtimes_do() {
        for (short, full) in [
            ("srcip", "docker.io/library/srcip:latest"),
            ("srcip:1", "docker.io/library/srcip:1"),
            ("somebody/srcip:1", "docker.io/somebody/srcip:1"),
            ("registry.example/srcip", "registry.example/srcip:latest"),
            ("localhost:5000/srcip:1", "localhost:5000/srcip:1"),
        ] {
            assert_eq!(full_name(short), full);
        }
    }
}
