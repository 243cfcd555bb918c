//! What an error of the API server means, and the cure.

use crate::dataplane::error::chain;

/// What was asked for, as RBAC has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    /// `get`, `list`, `watch` or `create`.
    pub(super) verb: &'static str,
    /// `pods` or `events.events.k8s.io`.
    pub(super) resource: &'static str,
}

/// The error in words for whoever runs the agent.
pub(super) fn explain(error: &kube::Error, asked: Asked) -> String {
    let Asked { verb, resource } = asked;
    match error {
        kube::Error::Api(status) => {
            let message = &status.message;
            match status.code {
                401 => format!(
                    "the API server does not accept who asks (401): {message}; in a pod, is the token of the \
                     service account mounted? outside, is the user of the kubeconfig still valid?"
                ),
                403 => format!(
                    "not allowed to {verb} {resource} (403): {message}; bind the agent's service account to a \
                     ClusterRole that has the verb `{verb}` on `{resource}`, as deploy/ does"
                ),
                code => format!("the API server answers {code} to {verb} {resource}: {message}"),
            }
        }
        _ => format!("cannot {verb} {resource}: {}", chain(error)),
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    fn explained(code: u16) -> String {
        let status = Status { code, message: "because".to_owned(), ..Status::default() };
        explain(&kube::Error::Api(Box::new(status)), Asked { verb: "list", resource: "pods" })
    }

    #[test]
    fn the_missing_rule_is_named() {
        assert!(explained(403).contains("has the verb `list` on `pods`"));
        assert!(explained(401).contains("token"));
        assert_eq!(explained(500), "the API server answers 500 to list pods: because");
    }

    #[test]
    fn causes_are_told_once() {
        let refused = std::io::Error::from_raw_os_error(libc::ECONNREFUSED);
        let error = kube::Error::ReadEvents(refused);
        assert_eq!(chain(&error), "Error reading events stream: Connection refused (os error 111)");
    }
}
