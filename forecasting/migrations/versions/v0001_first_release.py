"""Tables of the first release, which kept no version of them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Forward."""
    op.create_table(
        "answer_counts",
        sa.Column(
            "writer", sa.String(length=64), nullable=False, comment="web worker that answered"
        ),
        sa.Column("forecaster", sa.String(length=64), nullable=False),
        sa.Column("model_version", sa.Integer(), nullable=False),
        sa.Column("symbol", sa.String(length=32), nullable=False),
        sa.Column("origin", sa.Date(), nullable=False, comment="last row seen"),
        sa.Column(
            "answers", sa.BigInteger(), nullable=False, comment="GETs of one computed forecast"
        ),
        sa.Column("last_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("writer", "forecaster", "model_version", "symbol", "origin"),
    )
    op.create_table(
        "checks",
        sa.Column("symbol", sa.String(length=32), nullable=False),
        sa.Column("as_of", sa.Date(), nullable=False),
        sa.Column("forecaster", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False, comment="in production when checked"),
        sa.Column("share", sa.Float(), nullable=False, comment="share of features that drifted"),
        sa.Column("threshold", sa.Float(), nullable=False),
        sa.Column("drifted", sa.Boolean(), nullable=False),
        sa.Column(
            "features",
            sa.JSON(),
            nullable=False,
            comment="distance of each feature; score of a shift",
        ),
        sa.Column("flow_run_id", sa.String(length=36), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("symbol", "as_of", "forecaster", "version"),
    )
    op.create_table(
        "gate_looks",
        sa.Column("forecaster", sa.String(length=64), nullable=False),
        sa.Column(
            "model_sha256", sa.String(length=64), nullable=False, comment="of the candidate's graph"
        ),
        sa.Column(
            "first_day", sa.Date(), nullable=False, comment="first origin of the gate's windows"
        ),
        sa.Column("last_day", sa.Date(), nullable=False),
        sa.Column("days", sa.Integer(), nullable=False),
        sa.Column(
            "uses",
            sa.Float(),
            nullable=False,
            comment="other candidates judged before, mean over days",
        ),
        sa.Column("verdict", sa.String(length=16), nullable=False, comment="open|passed|refused"),
        sa.Column("reasons", sa.Text(), nullable=False),
        sa.Column("dataset_md5", sa.String(length=64), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("forecaster", "model_sha256", "first_day", "last_day"),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.String(length=36), nullable=False, comment="event id"),
        sa.Column("name", sa.String(length=120), nullable=False),
        sa.Column("resource", sa.String(length=200), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("occurred_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("delivered_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "predictions",
        sa.Column("id", sa.String(length=36), nullable=False, comment="one answered forecast"),
        sa.Column("horizon", sa.Integer(), nullable=False, comment="trading days ahead, from 1"),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "source",
            sa.String(length=8),
            nullable=False,
            comment="get: latest prices; post: client's rows; batch: flow; "
            "shadow, canary: challenger",
        ),
        sa.Column("symbol", sa.String(length=32), nullable=False),
        sa.Column("forecaster", sa.String(length=64), nullable=False),
        sa.Column("model_version", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column(
            "dataset_md5",
            sa.String(length=64),
            nullable=False,
            comment="of the model; see prices_md5",
        ),
        sa.Column(
            "prices_md5",
            sa.String(length=64),
            nullable=True,
            comment="dataset of the rows used, if ours",
        ),
        sa.Column("origin", sa.Date(), nullable=False, comment="last row seen"),
        sa.Column("origin_close", sa.Float(), nullable=False),
        sa.Column("target", sa.Date(), nullable=False, comment="session that is forecast"),
        sa.Column("levels", sa.JSON(), nullable=False),
        sa.Column(
            "quantiles", sa.JSON(), nullable=False, comment="prices, in units of the origin day"
        ),
        sa.Column(
            "actual",
            sa.Float(),
            nullable=True,
            comment="close on target in units of the origin day",
        ),
        sa.Column(
            "crps_bp", sa.Float(), nullable=True, comment="CRPS of the log return, basis points"
        ),
        sa.PrimaryKeyConstraint("id", "horizon"),
    )
    op.create_index(
        "ix_predictions_join", "predictions", ["symbol", "target", "actual"], unique=False
    )
    op.create_table(
        "promotions",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("forecaster", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column(
            "previous", sa.Integer(), nullable=True, comment="version that held the alias before"
        ),
        sa.Column(
            "fallback", sa.Integer(), nullable=True, comment="version that was `previous` before"
        ),
        sa.Column(
            "state", sa.String(length=16), nullable=False, comment="intended|moved|confirmed|undone"
        ),
        sa.Column("served", sa.String(length=200), nullable=False, comment="what the server said"),
        sa.Column("who", sa.String(length=200), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_promotions_forecaster"), "promotions", ["forecaster"], unique=False)
    op.create_table(
        "retrains",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("symbol", sa.String(length=64), nullable=False),
        sa.Column("as_of", sa.Date(), nullable=False),
        sa.Column("trigger", sa.Text(), nullable=False),
        sa.Column("flow_run_id", sa.String(length=36), nullable=False),
        sa.Column(
            "state",
            sa.String(length=16),
            nullable=False,
            comment="running|promoted|refused|unchanged|failed|skipped",
        ),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_retrains_symbol"), "retrains", ["symbol"], unique=False)
