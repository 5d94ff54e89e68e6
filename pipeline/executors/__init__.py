"""The executors there are, by name: each is a module of its own, imported when it is asked for."""

EXECUTORS = {
    "local": "pipeline.executors.local:LocalExecutor",
    "part": "pipeline.executors.part:PartExecutor",
    "ray": "pipeline.executors.ray:RayExecutor",
}
