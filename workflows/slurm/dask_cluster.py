"""Workers of Dask as jobs of SLURM.

python workflows/slurm/dask_cluster.py 20 scheduler.json

Then, from any machine that reads the same files:
strank predict slides.csv --model model -o maps --dask scheduler.json
"""

import json
import sys
import time
from pathlib import Path

from dask_jobqueue import SLURMCluster

if __name__ == "__main__":
    n_jobs, file = int(sys.argv[1]), Path(sys.argv[2])
    cluster = SLURMCluster(
        cores=4,
        processes=1,  # one unit a worker, and one worker a GPU
        memory="16GB",
        walltime="04:00:00",
        job_extra_directives=["--gres=gpu:1"],
    )
    cluster.scale(jobs=n_jobs)
    file.write_text(json.dumps({"address": cluster.scheduler_address}))
    print(f"{cluster.scheduler_address}, watched at {cluster.dashboard_link}; Ctrl-C ends it")
    while True:
        time.sleep(60)
