"""Starting and stopping engines: on this machine (`local`), later by Ray and Kubernetes."""
