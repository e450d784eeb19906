-- resolution: 256
--
-- What the detector of generated images is in doubt about, to be looked at: more real-looking than what pretraining removes, less than
-- what midtraining keeps. `k2 filter --run RUN --policy review`, then `k2 synthetic audit --run RUN --policy review --sample 200 ...`.
SELECT
  basics.uid,
  basics.error IS NULL AS decoded, -- 2: nothing can be said about a broken file
  synthetic.real_share > 0.05 AS not_synthetic, -- 5: below, pretraining removes it without a look
  NOT (synthetic.real_share > 0.15) AS in_doubt, -- 5: above, 85 % of real images lie
  NOT declared_ai OR missing('provenance') AS not_declared_ai -- 5: no doubt where the file says so
FROM basics
LEFT JOIN synthetic USING (uid)
LEFT JOIN provenance USING (uid)
