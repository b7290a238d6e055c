CREATE TABLE answer_counts (
    writer VARCHAR(64) NOT NULL,
    forecaster VARCHAR(64) NOT NULL,
    model_version INTEGER NOT NULL,
    symbol VARCHAR(32) NOT NULL,
    origin DATE NOT NULL,
    answers BIGINT NOT NULL,
    last_at DATETIME NOT NULL,
    PRIMARY KEY (writer, forecaster, model_version, symbol, origin)
);

CREATE TABLE checks (
    symbol VARCHAR(32) NOT NULL,
    as_of DATE NOT NULL,
    forecaster VARCHAR(64) NOT NULL,
    version INTEGER NOT NULL,
    share FLOAT NOT NULL,
    threshold FLOAT NOT NULL,
    drifted BOOLEAN NOT NULL,
    features JSON NOT NULL,
    flow_run_id VARCHAR(36) NOT NULL,
    created_at DATETIME NOT NULL,
    PRIMARY KEY (symbol, as_of, forecaster, version)
);

CREATE TABLE gate_looks (
    forecaster VARCHAR(64) NOT NULL,
    model_sha256 VARCHAR(64) NOT NULL,
    first_day DATE NOT NULL,
    last_day DATE NOT NULL,
    days INTEGER NOT NULL,
    uses FLOAT NOT NULL,
    verdict VARCHAR(16) NOT NULL,
    reasons TEXT NOT NULL,
    dataset_md5 VARCHAR(64) NOT NULL,
    run_id VARCHAR(64) NOT NULL,
    created_at DATETIME NOT NULL,
    PRIMARY KEY (forecaster, model_sha256, first_day, last_day)
);

CREATE TABLE outbox (
    id VARCHAR(36) NOT NULL,
    name VARCHAR(120) NOT NULL,
    resource VARCHAR(200) NOT NULL,
    payload JSON NOT NULL,
    occurred_at DATETIME NOT NULL,
    attempts INTEGER NOT NULL,
    delivered_at DATETIME,
    PRIMARY KEY (id)
);

CREATE TABLE predictions (
    id VARCHAR(36) NOT NULL,
    horizon INTEGER NOT NULL,
    made_at DATETIME NOT NULL,
    source VARCHAR(8) NOT NULL,
    symbol VARCHAR(32) NOT NULL,
    forecaster VARCHAR(64) NOT NULL,
    model_version INTEGER NOT NULL,
    run_id VARCHAR(64) NOT NULL,
    dataset_md5 VARCHAR(64) NOT NULL,
    prices_md5 VARCHAR(64),
    origin DATE NOT NULL,
    origin_close FLOAT NOT NULL,
    target DATE NOT NULL,
    levels JSON NOT NULL,
    quantiles JSON NOT NULL,
    actual FLOAT,
    crps_bp FLOAT,
    PRIMARY KEY (id, horizon)
);

CREATE INDEX ix_predictions_join ON predictions (symbol, target, actual);

CREATE TABLE promotions (
    id VARCHAR(36) NOT NULL,
    forecaster VARCHAR(64) NOT NULL,
    version INTEGER NOT NULL,
    previous INTEGER,
    fallback INTEGER,
    state VARCHAR(16) NOT NULL,
    served VARCHAR(200) NOT NULL,
    who VARCHAR(200) NOT NULL,
    why TEXT NOT NULL,
    created_at DATETIME NOT NULL,
    updated_at DATETIME NOT NULL,
    PRIMARY KEY (id)
);

CREATE INDEX ix_promotions_forecaster ON promotions (forecaster);

CREATE TABLE retrains (
    id VARCHAR(36) NOT NULL,
    symbol VARCHAR(64) NOT NULL,
    as_of DATE NOT NULL,
    "trigger" TEXT NOT NULL,
    flow_run_id VARCHAR(36) NOT NULL,
    state VARCHAR(16) NOT NULL,
    reason TEXT NOT NULL,
    created_at DATETIME NOT NULL,
    PRIMARY KEY (id)
);

CREATE INDEX ix_retrains_symbol ON retrains (symbol);


INSERT INTO answer_counts VALUES
    ('web-1', 'perennial-goog', 1, 'GOOG', '2008-01-02', 12, '2008-01-02 20:00:00+00:00');

INSERT INTO checks VALUES
    ('GOOG', '2008-01-02', 'perennial-goog', 1, 0.5, 0.5, TRUE, '{"log_range": 3.1}', 'local',
     '2008-01-02 20:00:00+00:00');

INSERT INTO gate_looks VALUES
    ('perennial-goog', 'abc', '2007-08-01', '2008-01-02', 120, 0.5, 'passed', 'better', 'd5', 'run',
     '2008-01-02 20:00:00+00:00');

INSERT INTO outbox VALUES
    ('1', 'perennial.drift.detected', 'perennial.symbol.GOOG', '{}', '2008-01-02 20:00:00+00:00', 0,
     NULL);

INSERT INTO predictions VALUES
    ('1', 2, '2008-01-02 20:00:00+00:00', 'get', 'GOOG', 'perennial-goog', 1, 'run', 'd5', 'd5',
     '2008-01-02', 685.19, '2008-01-04', '[0.1, 0.5, 0.9]', '[600, 685, 720]', NULL, 152.5);

INSERT INTO promotions VALUES
    ('1', 'perennial-goog', 1, NULL, NULL, 'confirmed', 'serves', 'anna', 'better',
     '2008-01-02 20:00:00+00:00', '2008-01-02 20:00:00+00:00');

INSERT INTO retrains VALUES
    ('1', 'GOOG', '2008-01-02', 'manual', 'local', 'promoted', 'better', '2008-01-02 20:00:00+00:00');
