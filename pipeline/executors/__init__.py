"""The executors there are, by name: each is a module of its own, imported when it is asked for."""

EXECUTORS = {
    "local": "pipeline.executors.local:LocalExecutor",
    "ray": "pipeline.executors.ray:RayExecutor",
}
# What `--part` asks for: it needs more than a name.
PART = "pipeline.executors.part:PartExecutor"
