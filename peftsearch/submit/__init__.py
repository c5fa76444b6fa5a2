"""A study as a job of a Ray cluster: sent there, followed from here, and going on without us.

The study file travels with the job, and so do the files that it names relative to itself. Everything else is read on
the cluster as the study file says: absolute paths, URIs, Hub ids and resources of installed packages. The driver runs
on the cluster's head. A job is found again by the study's name and its storage, so that submitting twice follows the
job that runs, and a study that has ended, for whatever reason, is continued by a new job.
"""

from peftsearch.submit.jobs import run_as_job, stop_job
from peftsearch.submit.storage_mark import check_arrival

__all__ = ["check_arrival", "run_as_job", "stop_job"]
