#!/usr/bin/env bash
# Two databases, each with a role of its own that sees nothing of the other: Optuna's ledgers, and MLflow's runs.
# PostgreSQL's image runs this once, when it makes its data folder (/docker-entrypoint-initdb.d).
set -euo pipefail

psql --set=ON_ERROR_STOP=1 --no-psqlrc --username="${POSTGRES_USER:-postgres}" --dbname=postgres \
  --set=ledger_password="$LEDGER_PASSWORD" --set=mlflow_password="$MLFLOW_PASSWORD" <<'SQL'
CREATE ROLE ledger LOGIN PASSWORD :'ledger_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE DATABASE ledger OWNER ledger;
CREATE DATABASE mlflow OWNER mlflow;
REVOKE ALL ON DATABASE ledger, mlflow, postgres FROM PUBLIC;
SQL
